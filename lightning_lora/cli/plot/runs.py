"""What a run has left on disk: curves from a ``metrics.csv`` of Lightning's CSVLogger, or from the demo's report."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.callbacks.monitor import PREFIX
from lightning_lora.errors import LoRAError, listing
from lightning_lora.metrics.memory import MIB

CSV, REPORT = "metrics.csv", "report.json"
_NOT_METRICS = ("step", "epoch")


@dataclass(frozen=True)
class Curve:
    """One metric over a run."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A run as it can be drawn.

    Attributes:
        curves: Metrics by name.
        memory: MiB by part, where the run has told them.
    """

    curves: dict[str, Curve]
    memory: dict[str, float]


def read_run(path: Path) -> Run:
    """Read what ``path`` holds: a folder with a ``metrics.csv`` in it or below, that file, or the demo's folder.

    Raises:
        LoRAError: If there is nothing, or more than one run.
    """
    if path.name == CSV and path.is_file():
        return _from_csv(path)
    if (path / REPORT).is_file():
        return _from_report(path / REPORT)
    found = sorted(path.rglob(CSV)) if path.is_dir() else []
    if not found:
        what = "holds no run" if path.exists() else "does not exist"
        raise LoRAError(
            f"{path} {what}: expected a folder with {CSV} (from Trainer(logger=CSVLogger(...))) or the demo's {REPORT}"
        )
    if len(found) > 1:
        raise LoRAError(f"{path} holds {len(found)} runs: pass {listing(str(file.parent) for file in found)}")
    return _from_csv(found[0])


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names for paths: as much of their ends as tells them apart."""
    whole = [path.resolve().with_suffix("") if path.suffix else path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def _from_csv(path: Path) -> Run:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, text in row.items():
            if name not in _NOT_METRICS and text and row.get("step"):
                points.setdefault(name, {})[int(row["step"])] = float(text)  # of a step told twice, the last
    memory = f"{PREFIX}memory_MiB/"
    return Run(
        curves={name: _curve(seen.items()) for name, seen in points.items() if not name.startswith(memory)},
        memory={
            name.removeprefix(memory): next(iter(seen.values())) for name, seen in points.items() if memory in name
        },
    )


def _from_report(path: Path) -> Run:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        parts = {
            "base": report["base_bytes"],
            "adapters": report["adapter_bytes"],
            "gradients": 4 * report["trainable"],
            "optimizer": report["optimizer"]["state_bytes"],
        }
        curve = Curve(tuple(range(len(report["losses"]))), tuple(report["losses"]))
    except (ValueError, KeyError, TypeError) as error:
        raise LoRAError(f"{path} is no report of lightning-lora demo, or of an earlier version ({error!r})") from None
    return Run({"bits/byte": curve}, {part: size / MIB for part, size in parts.items()})


def _curve(points: Iterable[tuple[int, float]]) -> Curve:
    kept = sorted((step, value) for step, value in points if not math.isnan(value))
    return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))
