"""What the documentation points at is there, and its code runs as it stands."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", (ROOT / "docs" / "traps.md").read_text())))


def names_in(path: Path) -> set[str]:
    """Names of the tests of a file as pytest has them, without parameters."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if "test_" in name}


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda value: value.rpartition("/")[2])
def test_every_test_that_the_traps_name_exists(file, test):
    assert test in names_in(ROOT / file)


def test_every_trap_names_a_test():
    rows = [line for line in (ROOT / "docs" / "traps.md").read_text().splitlines() if line.startswith("| ")]
    traps = [row for row in rows if not row.startswith("| situation")]
    assert len(traps) >= 35
    assert [row for row in traps if row.count("|") != 5 or "`tests/" not in row.split("|")[4]] == []


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, where a graph begins
@pytest.mark.parametrize("page", ["several-adapters.md", "monitoring.md", "compile.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
