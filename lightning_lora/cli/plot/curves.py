"""Curves of several runs: a panel for each metric, a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_lora.callbacks.monitor import PREFIX
from lightning_lora.cli.plot.runs import Curve, Run
from lightning_lora.cli.plot.style import LINES, figure
from lightning_lora.errors import LoRAError, listing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 6
"""Panels unless metrics are named."""

Panels = dict[str, dict[str, Curve]]
"""Curves by metric and then by run."""


def data(runs: Mapping[str, Run], metrics: Sequence[str] = ()) -> Panels:
    """Choose what to draw.

    Args:
        runs: Runs by label.
        metrics: Names; none means the first few of the run's own and of the monitor's, without those of single layers.

    Raises:
        LoRAError: If no run has one of the metrics, or there are more runs than can be told apart.
    """
    if len(runs) > len(LINES):
        raise LoRAError(f"{len(runs)} runs are more than can be told apart in one picture; pass at most {len(LINES)}")
    known = sorted({name for run in runs.values() for name in run.curves}, key=lambda name: (_is_ours(name), name))
    absent = [name for name in metrics if name not in known]
    if absent or not known:
        raise LoRAError(f"no run has {listing(absent) or 'a metric'}; there are: {listing(known, 30) or 'none'}")
    chosen = metrics or [name for name in known if not _is_of_a_layer(name)][:MOST]
    return {name: {label: run.curves[name] for label, run in runs.items() if name in run.curves} for name in chosen}


def draw(panels: Panels, labels: Sequence[str]) -> Figure:
    """Draw the panels in two columns; a run looks the same in each."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    made = figure(0.4 + (3.2 if columns == 1 else 2.1) * rows)
    grid = made.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        for label, curve in curves.items():
            every = max(1, len(curve.steps) // 8)
            axes.plot(curve.steps, curve.values, label=label, markevery=every, **LINES[labels.index(label)])
        axes.set(title=name, xlabel="optimizer step")
        axes.grid(axis="y")
    if len(labels) > 1:
        handles = {
            text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        ordered = [label for label in labels if label in handles]
        made.legend(
            [handles[label] for label in ordered], ordered, loc="outside upper center", ncols=min(3, len(labels))
        )
    return made


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX)


def _is_of_a_layer(name: str) -> bool:
    """Whether it is one layer's: the monitor's norms and ranks have their name behind a slash."""
    return name.startswith(tuple(f"{PREFIX}{kind}/" for kind in ("update_norm", "effective_rank", "stable_rank")))
