"""What training holds in memory, a stacked bar for each run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_lora.cli.plot.runs import Run
from lightning_lora.cli.plot.style import PARTS, figure
from lightning_lora.errors import LoRAError, listing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bars = dict[str, dict[str, float]]
"""MiB by bar and then by part."""


def data(runs: Mapping[str, Run]) -> Bars:
    """Take the breakdown of each run.

    Raises:
        LoRAError: If a run has none.
    """
    without = [label for label, run in runs.items() if not run.memory]
    if without:
        raise LoRAError(
            f"{listing(without)} told nothing of its memory; log it with AdapterMonitor(metrics=['memory', ...])"
        )
    named = {"trained": "trained along"}
    return {label: {named.get(part, part): size for part, size in run.memory.items()} for label, run in runs.items()}


def draw(bars: Bars, *, title: str = "", note: str = "") -> Figure:
    """Draw the bars, parts in one order and each with a hatching of its own, totals at their ends."""
    made = figure(1.25 + 0.42 * len(bars))
    axes = made.subplots()
    parts = [part for part in PARTS if any(sizes.get(part) for sizes in bars.values())]
    unit, divisor = ("GiB", 1024.0) if max(sum(sizes.values()) for sizes in bars.values()) >= 2048 else ("MiB", 1.0)
    for row, sizes in enumerate(bars.values()):
        left = 0.0
        for part in parts:
            size = sizes.get(part, 0.0) / divisor
            label = part if row == 0 else None
            axes.barh(row, size, left=left, height=0.62, edgecolor="#000000", linewidth=0.5, label=label, **PARTS[part])
            left += size
        axes.text(left, row, f" {left:#.3g}".rstrip("."), va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(xlabel=f"{unit}{note}", title=title)
    axes.margins(x=0.1)
    made.legend(loc="outside upper center", ncols=len(parts), handlelength=1.6, columnspacing=1.2)
    return made
