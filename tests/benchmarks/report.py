"""What a benchmark says: a table, the claims checked on it, the command that makes it again, and where it ran.

The table is printed, written as JSON and written as Markdown from the one value, so that the three cannot differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS = ("torch", "bitsandbytes", "peft", "transformers", "lightning")

Cell = str | float


@dataclass(frozen=True)
class Claim:
    """A statement with a number in it, and what was measured.

    Attributes:
        text: The statement, as documentation would make it.
        measured: What was found.
        limit: The largest value with which it holds.
    """

    text: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it holds; a value that is no number meets nothing."""
        return self.measured <= self.limit

    def __str__(self) -> str:
        if math.isnan(self.measured):
            return f"not measured: {self.text} (limit {self.limit:g})"
        verdict = "met" if self.met else "NOT MET"
        return f"{verdict}: {self.text} (measured {self.measured:.3f}, limit {self.limit:g})"


@dataclass(frozen=True)
class Report:
    """The outcome of one benchmark.

    Attributes:
        title: One line.
        command: What makes the figures again, from the repository's root.
        columns: Names of the columns, with units.
        rows: One row per case; numbers are rounded for people only.
        claims: What was checked.
        note: How to read the table, and what is not in it.
    """

    title: str
    command: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    claims: Sequence[Claim] = ()
    note: str = ""

    def text(self) -> str:
        """The table for a terminal."""
        cells = [tuple(self.columns), *(tuple(map(_shown, row)) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([self.title, "", *lines, "", *map(str, self.claims)])

    def markdown(self) -> str:
        """The table for the documentation, under a heading, with its command."""
        head = [f"## {self.title}", "", f"`{self.command}`", ""]
        table = [
            _markdown_row(self.columns),
            _markdown_row(["---"] * len(self.columns)),
            *(_markdown_row(list(map(_shown, row))) for row in self.rows),
        ]
        note = ["", self.note] if self.note else []
        claims = ["", *(f"- {claim}" for claim in self.claims)] if self.claims else []
        return "\n".join([*head, *table, *note, *claims, ""])

    def to_json(self) -> dict[str, Any]:
        """The figures unrounded, with the claims' verdicts."""
        claims = [dataclasses.asdict(claim) | {"met": claim.met} for claim in self.claims]
        return dataclasses.asdict(self) | {"claims": claims}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Read back what :meth:`to_json` gave."""
        claims = [Claim(claim["text"], claim["measured"], claim["limit"]) for claim in data["claims"]]
        return cls(**(data | {"claims": claims}))


def environment() -> dict[str, str]:
    """Versions, processor features and threads: what a figure depends on beside the code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in DISTRIBUTIONS},
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{'with' if torch.cpu._is_avx512_bf16_supported() else 'without'} AVX512-BF16, "
        f"{'with' if torch.cpu._is_amx_tile_supported() else 'without'} AMX",
        "threads": str(torch.get_num_threads()),
    }


def command(script: str, repeats: int) -> str:
    """Return the command line that ran, from the repository's root."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return f"{prefix}python tests/benchmarks/{Path(script).name} --repeats {repeats}"


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes; ``description`` is the script's own docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help=f"measurements per case (default {repeats})"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here, unrounded")
    return made


def run(description: str | None, measure: Callable[[int], Report], *, repeats: int) -> None:
    """Read the command line, measure, print the table and write the JSON that was asked for."""
    arguments = parser(description, repeats=repeats).parse_args()
    if arguments.repeats < 1:
        raise SystemExit(f"--repeats must be at least 1, got {arguments.repeats}")
    report = measure(arguments.repeats)
    print(report.text())
    if arguments.json is not None:
        document = {"environment": environment(), **report.to_json()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:.3f}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
