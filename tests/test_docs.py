"""What the documentation points at is there, and its code runs as it stands."""

import ast
import contextlib
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import yaml

import lightning_lora
from lightning_lora import LoRACallback
from lightning_lora.cli.main import _parser
from tests.documented import GIVEN

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in path.parts
}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", (ROOT / "docs" / "traps.md").read_text())))
FENCE = re.compile(r"^(`{3,})([\w{}-]*)[^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, how many lines stand above it, and the text block right behind it."""

    language: str
    text: str
    line: int
    says: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    found = list(FENCE.finditer(text))
    for match, after in zip_longest(found, found[1:]):
        adjacent = after is not None and after[2] == "text" and not text[match.end() : after.start()].strip()
        says = after[3] if after is not None and adjacent else None
        yield Block(match[2], match[3], text.count("\n", 0, match.start(3)), says)


def of(language: str) -> dict[str, list[Block]]:
    """The blocks of each page that has any in a language."""
    found = {name: [block for block in blocks(path) if block.language == language] for name, path in PAGES.items()}
    return {name: those for name, those in found.items() if those}


PYTHON, YAML = of("python"), of("yaml")


def outcome(block: Block, page: Path, names: dict[str, object]) -> str:
    """What a block prints, and the error it ends with where the page says that it does."""
    printed = io.StringIO()
    code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
    ends_with_error = re.match(r"\w*Error: ", block.says or "")
    with contextlib.redirect_stdout(printed):
        if ends_with_error is None:
            exec(code, names)
        else:
            with pytest.raises(Exception) as error:  # noqa: PT011 (which, and its words, are compared with the page)
                exec(code, names)
            print(f"{type(error.value).__name__}: {error.value}")
    return printed.getvalue()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, where a graph begins
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")  # the Trainer's default logger
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # between PEFT and transformers
@pytest.mark.parametrize("name", PYTHON)
def test_the_code_of_a_page_runs_from_top_to_bottom_and_says_what_the_page_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    page = types.ModuleType("documented_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    vars(page).update(GIVEN[name](monkeypatch) if name in GIVEN else {})
    torch.manual_seed(0)
    for block in PYTHON[name]:
        said = outcome(block, PAGES[name], vars(page))
        if block.says is not None:
            assert said.split() == block.says.split()


@pytest.mark.parametrize("name", YAML)
def test_a_section_lora_makes_a_callback(name):
    for block in YAML[name]:
        settings = yaml.safe_load(block.text)
        LoRACallback(**settings.get("lora", {}))


COMMANDS = sorted(
    {
        line
        for those in of("").values()
        for block in those
        for line in re.findall(r"^(?:\$ )?(lightning-lora (?!fit)\w+(?: .*)?)$", block.text, re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_line_knows_what_a_page_types(line):
    _, *arguments = shlex.split(line)
    assert _parser().parse_args(arguments).command == arguments[0]


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    text = FENCE.sub("", PAGES[name].read_text())
    named = set(re.findall(r"`((?:tests|docs|examples|lightning_lora)/[\w./-]+)", text))
    assert [path for path in sorted(named) if not (ROOT / path.rstrip(".")).exists()] == []


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda value: value.rpartition("/")[2])
def test_every_test_that_the_traps_name_exists(file, test):
    assert test in names_in(ROOT / file)


@cache
def names_in(path: Path) -> set[str]:
    """Names of the tests of a file as pytest has them, without parameters."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if "test_" in name}


def test_every_trap_names_a_test():
    rows = [line for line in (ROOT / "docs" / "traps.md").read_text().splitlines() if line.startswith("| ")]
    traps = [row for row in rows if not row.startswith("| situation")]
    assert len(traps) >= 35
    assert [row for row in traps if row.count("|") != 5 or "`tests/" not in row.split("|")[4]] == []


def rows(heading: str) -> list[str]:
    """Rows of the table of a section of the README, without its head."""
    section = (ROOT / "README.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_every_row_of_the_comparison_links_to_the_tests_or_the_script_that_hold_it():
    compared = rows("Compared with others")
    assert len(compared) >= 15
    for row in compared:
        shown = re.findall(r'\[(test|script)\]\((tests/[\w/]+\.py)(?: "(\w+)")?\)', row.split("|")[-2])
        assert shown, row
        for kind, path, test in shown:
            made = (ROOT / path).is_file() and path.startswith("tests/benchmarks/")
            assert test in names_in(ROOT / path) if kind == "test" else made, row


def test_every_result_names_what_makes_it_again():
    results = rows("Results")
    assert len(results) >= 10
    assert [
        row for row in results if not re.search(r"`(tests/[\w/]+\.py|examples/\w+\.py|lightning-lora demo)`", row)
    ] == []


def test_the_api_page_has_every_public_name_and_no_other():
    listed = re.findall(r"auto(?:class|function|exception):: (\w+)", (ROOT / "docs" / "api.md").read_text())
    assert sorted(listed) == sorted(set(lightning_lora.__all__) - {"__version__"})
