"""Singular values of the update of each layer, and over how many directions it is spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lora.cli.plot.style import COLORMAP, LINES, figure, label_rows, row_height
from lightning_lora.errors import LoRAError
from lightning_lora.metrics.effective_rank import effective_rank
from lightning_lora.metrics.spectrum import Factors, singular_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 3
"""Adapters in one picture."""


@dataclass(frozen=True)
class Spectra:
    """What is drawn.

    Attributes:
        layers: Names of the rows, of all adapters.
        values: For each adapter singular values of shape ``(layers, K)``; NaN where there is none.
        ranks: For each adapter the effective rank of each layer, of shape ``(layers,)``; NaN where it has none.
    """

    layers: list[str]
    values: dict[str, Tensor]
    ranks: dict[str, Tensor]


def data(adapters: Mapping[str, Mapping[str, Factors]]) -> Spectra:
    """Decompose the updates of adapters, given by label.

    Raises:
        LoRAError: If they are too many for one picture.
    """
    if len(adapters) > MOST:
        raise LoRAError(f"{len(adapters)} adapters do not fit beside each other; pass at most {MOST}")
    layers = list(dict.fromkeys(layer for adapter in adapters.values() for layer in adapter))
    values, ranks = {}, {}
    for label, adapter in adapters.items():
        found = {layer: singular_values(*factors) for layer, factors in adapter.items()}
        values[label] = torch.full((len(layers), max(map(len, found.values()))), torch.nan, dtype=torch.float64)
        ranks[label] = torch.full((len(layers),), torch.nan, dtype=torch.float64)
        for layer, spectrum in found.items():
            row = layers.index(layer)
            values[label][row, : len(spectrum)] = spectrum
            ranks[label][row] = effective_rank(spectrum)
    return Spectra(layers, values, ranks)


def draw(spectra: Spectra) -> Figure:
    """Draw a heat map for each adapter, on one scale, and the effective ranks beside them."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    height = row_height(len(spectra.layers))
    made = figure(height + 1.0)
    count = len(spectra.values)
    grid = made.subplots(1, count + 1, sharey=True, width_ratios=[2.0] * count + [1.3], squeeze=False)[0]
    seen = torch.cat([values[values > 0] for values in spectra.values.values()])
    top = seen.max().item() if len(seen) else 1.0
    scale = LogNorm(max(seen.min().item() if len(seen) else 0.1, 1e-3 * top), top)
    for axes, (label, values) in zip(grid, spectra.values.items(), strict=False):
        image = axes.imshow(values.clamp(min=scale.vmin).numpy(), aspect="auto", cmap=COLORMAP, norm=scale)
        axes.set(title=label, xlabel="i")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda index, _: f"{index + 1:.0f}")
    for (label, ranks), look in zip(spectra.ranks.items(), LINES, strict=False):
        grid[-1].plot(ranks.numpy(), range(len(spectra.layers)), **{**look, "linestyle": "none"}, label=label)
    most = max(values.shape[1] for values in spectra.values.values())
    grid[-1].set(xlabel="effective rank", xlim=(0, 1.08 * most))  # a mark at full rank is whole
    grid[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid[-1].grid(axis="x")
    if count > 1:
        grid[-1].legend(loc="lower left", bbox_to_anchor=(0, 1), handlelength=1)
    label_rows(grid[0], spectra.layers, height)
    made.colorbar(image, ax=list(grid[:-1]), label="singular value σᵢ of ΔW", location="bottom", aspect=40)
    return made
