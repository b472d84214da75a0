"""Every link of the documentation leads somewhere: to a file, to a heading of it, or to an address that can be one.

Whether addresses answer, ``python -m sphinx -b linkcheck docs docs/_build/links`` tells where there is a network.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if "_build" not in path.parts
}
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"|<(https?://[^>\s]+)>")
CODE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
DEEPEST = 3  # docs/conf.py, myst_heading_anchors


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures; a link's text may be code, its target is not."""
    text = CODE.sub("code", page.read_text())
    return [next(filter(None, found)) for found in LINK.findall(text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names of a page's headings as code hosts make them: small letters, hyphens for spaces, nothing else but ``_``."""
    text = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: Counter[str] = Counter()
    names = set()
    for title in re.findall(rf"^#{{1,{DEEPEST}}} +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return frozenset(names)


INSIDE = [(name, link) for name, path in PAGES.items() for link in links(path) if not urlsplit(link).scheme]
OUTSIDE = {link: name for name, path in PAGES.items() for link in links(path) if urlsplit(link).scheme}


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_to_files_of_the_repository(name):
    for link in [link for page, link in INSIDE if page == name]:
        path = (PAGES[name].parent / link.partition("#")[0]).resolve() if not link.startswith("#") else PAGES[name]
        assert path.is_relative_to(ROOT), f"{link}: outside the repository"
        assert path.exists(), link


@pytest.mark.parametrize(("name", "link"), [pair for pair in INSIDE if "#" in pair[1]])
def test_an_anchor_is_a_heading(name, link):
    file, _, anchor = link.partition("#")
    page = PAGES[name].parent / file if file else PAGES[name]
    assert anchor in anchors(page), sorted(anchors(page))


@pytest.mark.parametrize("link", OUTSIDE)
def test_an_address_is_one_that_can_be_opened_and_is_given_in_one_form(link):
    parts = urlsplit(link)
    assert parts.scheme == "https"
    assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
    assert re.fullmatch(r"[\w./~%:@+-]*[\w/]", parts.path or "/")
    assert [other for other in OUTSIDE if other != link and other.rstrip("/") == link.rstrip("/")] == []


def test_an_address_outside_the_site_is_one_that_the_site_has_too():
    """The link checker reads the site, which includes the changelog and the index of examples."""
    read = {
        link for name, path in PAGES.items() if name not in ("README.md", "CONTRIBUTING.md") for link in links(path)
    }
    assert set(OUTSIDE) - read == set()


def test_pictures_are_small_enough_to_be_kept_in_the_repository():
    shown = {PAGES[name].parent / link for name, link in INSIDE if link.endswith((".png", ".svg"))}
    assert len(shown) >= 8
    assert [path.name for path in shown if path.stat().st_size > 150_000] == []


def test_headings_become_anchors_as_on_code_hosts(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# NF4: what `W` is\n## EVA\n```\n# no heading\n```\n## EVA\n#### too deep\n### [A link](x.md), r_1\n"
    )
    assert anchors(page) == {"nf4-what-w-is", "eva", "eva-1", "a-link-r_1"}
