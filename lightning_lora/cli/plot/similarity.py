"""How much of the directions of one adapter another has found too: φ of the LoRA paper (section 7.2) as heat maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_lora.cli.plot.style import COLORMAP, figure
from lightning_lora.errors import LoRAError, listing
from lightning_lora.metrics.spectrum import Factors
from lightning_lora.metrics.subspace_similarity import SubspaceSimilarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Similarity:
    """What is drawn.

    Attributes:
        labels: Of both adapters.
        inputs: Mean φ of the directions of ``A``, of shape ``(R, R')``.
        outputs: The same of ``B``.
        layers: Layers the mean is over.
        left_out: Layers both adapters are on, with other ranks.
    """

    labels: tuple[str, str]
    inputs: Tensor
    outputs: Tensor
    layers: list[str]
    left_out: list[str]


def data(adapters: Mapping[str, Mapping[str, Factors]]) -> Similarity:
    """Compare two adapters, given by label, on the layers that both are on; of several pairs of ranks the most common.

    Raises:
        LoRAError: If they are not two, or share no layer.
    """
    if len(adapters) != 2:
        raise LoRAError(f"similarity compares two adapters, and {len(adapters)} were given; pass two different paths")
    (first_label, first), (second_label, second) = adapters.items()
    shared = [layer for layer in first if layer in second]
    if not shared:
        raise LoRAError(
            f"the adapters share no layer: {first_label} is on {listing(first)}; {second_label} on {listing(second)}"
        )
    ranks = {layer: (first[layer][0].shape[0], second[layer][0].shape[0]) for layer in shared}
    common = Counter(ranks.values()).most_common(1)[0][0]
    inputs, outputs = SubspaceSimilarity(*common), SubspaceSimilarity(*common)
    layers = [layer for layer in shared if ranks[layer] == common]
    for layer in layers:
        inputs.update(first[layer][0], second[layer][0])
        outputs.update(first[layer][1].T, second[layer][1].T)
    return Similarity(
        labels=(first_label, second_label),
        inputs=inputs.compute(),
        outputs=outputs.compute(),
        layers=layers,
        left_out=[layer for layer in shared if layer not in layers],
    )


def draw(similarity: Similarity) -> Figure:
    """Draw ``φ(i, j)`` of input and of output directions on one scale from 0 to 1."""
    made = figure(3.4)
    titles = ("input directions: rows of A", "output directions: columns of B")
    grid = made.subplots(1, 2)
    for axes, title, phi in zip(grid, titles, (similarity.inputs, similarity.outputs), strict=True):
        rows, columns = phi.shape
        extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
        image = axes.imshow(phi.numpy(), cmap=COLORMAP, vmin=0, vmax=1, extent=extent, aspect="auto")
        axes.set(title=title, xlabel=f"j: first directions of {similarity.labels[1]}", xticks=_ticks(columns))
        axes.set(ylabel=f"i: first directions of {similarity.labels[0]}", yticks=_ticks(rows))
    count = len(similarity.layers)
    what = f"on {similarity.layers[0]}" if count == 1 else f"mean of {count} layers"
    made.colorbar(image, ax=list(grid), label=f"φ(i, j), {what}", aspect=30)
    return made


def _ticks(count: int) -> list[int]:
    every = max(1, -(-count // 8))
    return sorted({1, *range(every, count + 1, every)})
