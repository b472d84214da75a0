"""The figures of a comparison as one value that is written as JSON, and the tables and claims that follow from it."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from report import Cell, Report
from timing import median_ratio

from peers.steps import Outcome

OURS, PEFT, PEFT_BF16, FLOOR = "ours", "PEFT default", "PEFT bf16 adapters", "frozen floor"
MIB = 2**20
MISSING = math.nan
VERDICTS = ("skipped", "failed")


@dataclass
class Table:
    """Outcomes by contender, and how many tokens a step has, if it has steps."""

    tokens: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)


@dataclass
class Document:
    """All that was measured, by scenario.

    Attributes:
        environment: Where.
        command: By what.
        steps: Training steps.
        handling: What happens once in a run.
    """

    environment: dict[str, str]
    command: str
    steps: dict[str, Table] = field(default_factory=dict)
    handling: dict[str, Table] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, unrounded."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Document:
        """Read back what :meth:`to_json` gave."""
        tables = {part: {name: Table(**table) for name, table in data[part].items()} for part in ("steps", "handling")}
        return cls(**(data | tables))

    def troubles(self) -> list[str]:
        """Who was not measured where, and why."""
        tables = {**self.steps, **self.handling}
        return [
            f"{where}: {name} {verdict}: {its[verdict]}"
            for where, table in tables.items()
            for name, its in table.outcomes.items()
            for verdict in VERDICTS
            if verdict in its
        ]

    def step_ratio(self, scenario: str, name: str, other: str, *, optimizer: str | None = None) -> float:
        """Return the median over the rounds of one contender's step / another's; NaN if one was not measured.

        Args:
            scenario: In which.
            name: Of the one.
            other: Of the other.
            optimizer: Whether and with which optimizer's step.
        """
        seconds = [whole(self._outcome(scenario, each), optimizer) for each in (name, other)]
        return median_ratio(*seconds) if all(seconds) else MISSING

    def ratio(self, scenario: str, name: str, other: str, what: str) -> float:
        """Return one figure / another contender's."""
        figures = [self._outcome(scenario, each).get(what, MISSING) for each in (name, other)]
        return figures[0] / figures[1]

    def step_seconds(self, scenario: str, name: str) -> float:
        """Return the median seconds of a forward and backward pass."""
        seconds = self._outcome(scenario, name).get("step", [])
        return statistics.median(seconds) if seconds else MISSING

    def figure(self, scenario: str, name: str, what: str) -> float:
        """Return a figure; of several rounds the median."""
        table = self.handling if scenario in self.handling else self.steps
        found = table[scenario].outcomes.get(name, {}).get(what, MISSING) if scenario in table else MISSING
        return statistics.median(found) if isinstance(found, list) and found[0] is not None else found or MISSING

    def _outcome(self, scenario: str, name: str) -> Outcome:
        return self.steps[scenario].outcomes.get(name, {}) if scenario in self.steps else {}


def whole(outcome: Outcome, optimizer: str | None) -> list[float]:
    """Seconds of each round, with the optimizer's step if one is named; empty if it was not measured."""
    if optimizer is None:
        return list(outcome.get("step", []))
    return [sum(pair) for pair in zip(outcome.get("step", []), outcome.get(optimizer, []), strict=False)]


def step_report(document: Document, scenario: str) -> Report:
    """The table of one scenario."""
    table = document.steps[scenario]
    columns = [
        "contender",
        "forward + backward, ms",
        "x floor",
        "PEFT default / this",
        "8-bit AdamW, ms",
        "fused AdamW, ms",
        "tokens/s",
        "peak, MiB",
        "saved, MiB",
        "loss off",
        "gradient norm off",
    ]
    rows: list[list[Cell]] = []
    for name, its in table.outcomes.items():
        if "step" not in its:
            rows.append([name, _verdict(its), *["-"] * (len(columns) - 2)])
            continue
        seconds = whole(its, "8-bit") or its["step"]
        rows.append(
            [
                name,
                _number(1e3 * statistics.median(its["step"]), 1),
                _number(document.step_ratio(scenario, name, FLOOR), 3),
                _number(document.step_ratio(scenario, PEFT, name), 3),
                *(
                    _number(1e3 * statistics.median(its[kind]), 2) if kind in its else "-"
                    for kind in ("8-bit", "fused")
                ),
                _number(table.tokens / statistics.median(seconds), 0),
                _number(its["peak"] / MIB, 1),
                _number(its["saved"] / MIB, 1),
                *(f"{its[what]:+.1e}" if what in its else "-" for what in ("loss off", "norm off")),
            ]
        )
    return Report(title=scenario, command=document.command, columns=columns, rows=rows)


def handling_report(document: Document, scenario: str) -> Report:
    """The table of what happens once."""
    table = document.handling[scenario]
    names = list(dict.fromkeys(what for its in table.outcomes.values() for what in its if isinstance(its[what], list)))
    in_bytes = ("size", "peak", "largest layer")
    rows: list[list[Cell]] = []
    for name, its in table.outcomes.items():
        found = {what: document.figure(scenario, name, what) for what in names}
        shown = [_number(found[w] / MIB, 1) if w in in_bytes else _number(found[w], 4) for w in names]
        rows.append([name, *([_verdict(its), *["-"] * (len(names) - 1)] if _verdict(its) else shown)])
    columns = ["contender", *(f"{what}, MiB" if what in in_bytes else f"{what}, s" for what in names)]
    return Report(title=scenario, command=document.command, columns=columns, rows=rows)


def _verdict(outcome: Outcome) -> str:
    return "".join(verdict for verdict in VERDICTS if verdict in outcome)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
