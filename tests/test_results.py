"""Results hold what is promised of them, and figures that pages repeat are those of the page that a script wrote."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SENTIMENT = (ROOT / "docs/benchmarks/sentiment.md").read_text()
CHOOSING = (ROOT / "docs/guides/choosing.md").read_text()


def table(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose first column is headed ``first``, by their first cell."""
    lines = text[text.index(f"\n| {first} |") + 1 :].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]
    return {name: cells for name, *cells in rows[2:]}


SCORES = table(SENTIMENT, "method")


def accuracy(method: str) -> float:
    return float(SCORES[method][1].split(" ± ")[0])


def test_the_page_on_sentiment_is_the_scripts_with_seeds():
    [command] = re.findall(r"^    (python .*)$", SENTIMENT, re.MULTILINE)
    _, script, *arguments = shlex.split(command)
    assert f"Written by `{script}`" in SENTIMENT
    assert (ROOT / script).exists()
    assert int(arguments[arguments.index("--seeds") + 1]) >= 3
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for cells in SCORES.values() for cell in cells[1:3])


@pytest.mark.parametrize(
    ("one", "least", "other"),
    [("qlora", -1, "lora"), ("lora", -2, "full"), ("lora", 3, "probe"), ("qlora", 3, "probe"), ("full", 3, "probe")],
)
def test_quantizing_costs_a_point_at_most_adapters_two_and_all_are_well_above_a_probe(one, least, other):
    [written] = re.findall(rf"^- {one} - {other}: ([+-]\d+\.\d) points$", SENTIMENT, re.MULTILINE)
    assert float(written) == pytest.approx(accuracy(one) - accuracy(other), abs=0.11)  # each of three is rounded
    assert float(written) >= least


def test_the_guide_repeats_what_the_script_found_on_sentiment():
    names = {"linear probe": "probe", "LoRA": "lora", "QLoRA": "qlora", "full fine-tuning": "full"}
    repeated = table(CHOOSING, "sentiment, three seeds")
    assert repeated == {name: SCORES[method][:2] for name, method in names.items()}


def test_the_readme_repeats_what_the_script_found_on_sentiment():
    [row] = re.findall(r"^\| SST-2 .*accuracy: ([\w, ]+) \| ([\d., ]+) .*$", (ROOT / "README.md").read_text(), re.M)
    methods, values = ([word.strip() for word in cell.split(",")] for cell in row)
    assert {method.lower(): float(value) for method, value in zip(methods, values, strict=True)} == {
        method.lower(): accuracy(method.lower()) for method in methods
    }


def test_the_guide_repeats_what_the_script_found_on_digits():
    written = table((ROOT / "docs/benchmarks/learning.md").read_text(), "method")
    names = {"full fine-tuning": "full", "LoRA, rank 7": "LoRA", "QLoRA": "QLoRA", "DoRA": "DoRA", "PiSSA": "PiSSA"}
    found = {name: [written[method][1], written[method][3]] for name, method in names.items()}
    repeated = table(CHOOSING, "digits, five seeds")
    assert {name: [float(share), score] for name, (share, score) in repeated.items()} == {
        name: [float(share), score] for name, (share, score) in found.items()
    }
