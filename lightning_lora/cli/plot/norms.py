"""How far each layer has been moved: of runs relative to the base weight, of adapters on disk absolutely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_lora.callbacks.monitor import PREFIX
from lightning_lora.cli.plot.runs import Run
from lightning_lora.cli.plot.style import LINES, figure, label_rows, row_height
from lightning_lora.errors import LoRAError, listing
from lightning_lora.metrics.spectrum import Factors, singular_values
from lightning_lora.metrics.update_norm import update_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Norms = dict[str, dict[str, float]]
"""By run or adapter, and then by layer."""

OF_RUNS = "‖ΔW‖ / ‖W‖ at the end (Frobenius norms)"
OF_ADAPTERS = "‖ΔW‖ (Frobenius norm)"


def of_runs(runs: Mapping[str, Run]) -> Norms:
    """Take the last relative norm that was logged of each layer.

    Raises:
        LoRAError: If a run has logged none.
    """
    prefix = f"{PREFIX}update_norm/"
    found = {
        label: {name.removeprefix(prefix): c.values[-1] for name, c in run.curves.items() if name.startswith(prefix)}
        for label, run in runs.items()
    }
    without = [label for label, norms in found.items() if not norms]
    if without:
        raise LoRAError(
            f"{listing(without)} logged no norms of single layers; log them with AdapterMonitor(detail='layers')"
        )
    return found


def of_adapters(adapters: Mapping[str, Mapping[str, Factors]]) -> Norms:
    """Compute the norm of each update; the base weights, which are not in the file, are left out."""
    return {
        label: {layer: update_norm(singular_values(*factors)).item() for layer, factors in adapter.items()}
        for label, adapter in adapters.items()
    }


def draw(norms: Norms, what: str) -> Figure:
    """Draw a row for each layer and a mark for each run or adapter."""
    if len(norms) > len(LINES):
        raise LoRAError(
            f"{len(norms)} series are more than can be told apart in one picture; pass at most {len(LINES)}"
        )
    layers = list(dict.fromkeys(layer for found in norms.values() for layer in found))
    height = row_height(len(layers))
    made = figure(height + 0.8)
    axes = made.subplots()
    for (label, found), look in zip(norms.items(), LINES, strict=False):
        rows = [row for row, layer in enumerate(layers) if layer in found]
        axes.plot([found[layers[row]] for row in rows], rows, **{**look, "linestyle": "none"}, label=label)
    axes.set(xlabel=what, xlim=(0, None))
    axes.grid()
    label_rows(axes, layers, height)
    if len(norms) > 1:
        made.legend(loc="outside upper center", ncols=min(3, len(norms)))
    return made
