"""Which row of a batch goes through which adapter, and how a layer computes that.

The frozen product is one for the whole batch. Then rows are gathered by adapter, each adapter computes on its own, and
one permutation puts the result back in order: two copies of the output however many adapters there are, forward and
backward, and nothing is asked of the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError

if TYPE_CHECKING:
    from lightning_lora.nn.adapted import AdaptedLayer


class Rows:
    """An adapter, or none, for each row of a batch: a fixed value, whose permutations are computed once.

    Args:
        names: The adapter of each row; None is the plain base.
        paths: The layers by their names in the model, for messages.

    Attributes:
        batch: How many rows there are.
        adapters: The adapters that occur, in the order of their first rows.
        mixed: Whether there is one.
    """

    def __init__(self, names: Sequence[str | None], paths: Mapping[nn.Module, str]) -> None:
        groups: dict[str | None, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(name, []).append(index)
        self.batch = len(names)
        self.adapters = tuple(name for name in groups if name is not None)
        self.mixed = bool(self.adapters)
        self._groups = tuple((name, len(rows)) for name, rows in groups.items())
        self._order = [index for rows in groups.values() for index in rows]
        self._paths = paths
        self._permutations: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    # The number of rows of each adapter differs from batch to batch. Traced, each new one would be compiled anew; so
    # the compiled graph ends before the layer, and the next one starts behind it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        """Return the layer's output, in which each row has gone through its adapter.

        Args:
            layer: The layer.
            x: Its input, whose first axis is the batch, or the batch with each row repeated equally often in place.

        Raises:
            AdapterError: If the first axis is neither; the message names the layer.
        """
        repeats = self._repeats(layer, x)
        counts = [count * repeats for _, count in self._groups]
        y = layer.base_layer(x)
        in_order = self._order == sorted(self._order)
        if not in_order:
            forth, back = self._permutation(x.device, repeats)
            x, y = x.index_select(0, forth), y.index_select(0, forth)
        outputs = [
            self._adapted(layer, name, part, output)
            for (name, _), part, output in zip(
                self._groups, x.split_with_sizes(counts), y.split_with_sizes(counts), strict=True
            )
        ]
        together = torch.cat(outputs)
        return together if in_order else together.index_select(0, back)

    @staticmethod
    def _adapted(layer: AdaptedLayer, name: str | None, x: Tensor, y: Tensor) -> Tensor:
        """The output ``y`` of the base for some rows, with what adapter ``name`` does to it."""
        lacking = layer.base_lacks
        if lacking is not None and name != lacking:
            y = layer.adapter(lacking).put_back(y, x)
        return layer.adapter(name)(x, y, layer.base_layer) if name and name in layer.adapters else y

    def _repeats(self, layer: AdaptedLayer, x: Tensor) -> int:
        """How often each row of the batch is repeated; tokens in one axis cannot be, they would be positions."""
        if layer.kind.has_batch(x):
            repeats, left = divmod(x.shape[0], self.batch)
            if left == 0 and (repeats == 1 or x.dim() > 1):
                return repeats
        name = self._paths.get(layer, type(layer).__name__)
        raise AdapterError(
            f"{name} got an input of shape {tuple(x.shape)}, whose rows cannot be told apart: {self.batch} names were "
            "routed. The first axis of every adapted layer's input has to be the batch, or the batch with each row "
            "repeated equally often, one after the other"
        )

    def _permutation(self, device: torch.device, repeats: int) -> tuple[Tensor, Tensor]:
        """The rows by adapter, and where each of them goes back to."""
        key = (device, repeats)
        if key not in self._permutations:
            with torch.inference_mode(mode=False):  # a later forward may be one that is trained
                order = torch.tensor(self._order, device=device)[:, None] * repeats
                forth = (order + torch.arange(repeats, device=device)).flatten()
                self._permutations[key] = forth, forth.argsort()
        return self._permutations[key]


BASE = Rows([None], {})
"""No adapter for any row, of however many there are."""
