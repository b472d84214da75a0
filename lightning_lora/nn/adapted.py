"""The layer that takes another's place: the frozen base below, named adapters on top."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.base import dense_weight, layer_bias, weight_device, weight_dtype
from lightning_lora.nn.kinds import kind_of


class AdaptedLayer(nn.Module):
    """A layer with adapters: ``y = base_layer(x)``, then each active adapter in turn.

    Attributes:
        base_layer: The frozen layer. Its own attributes (``in_features``, ``stride``, ``padding_idx``) are those of the
            adapted layer too.
        kind: How the base layer applies its weight.
        adapters: Adapters by name.
        active: Names of the adapters that compute, in order; empty means the plain base layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the base layer's output, changed by the active adapters."""
        y: Tensor = self.base_layer(x)
        for name in self.active:
            y = self.adapters[name](x, y, self.base_layer)
        return y

    def adapter(self, name: str) -> Adapter:
        """Return the adapter called ``name``."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def merged_weight(self) -> Tensor:
        """Return the weight that computes what the active adapters compute, without dropout, as the base stores it.

        Summed in ``float32`` at least, whatever the base is stored in, so that a small update is not lost to rounding.
        """
        weight = dense_weight(self.base_layer, torch.promote_types(weight_dtype(self.base_layer), torch.float32))
        for name in self.active:
            weight = self.adapter(name).merged(weight)
        return weight

    @property
    def weight(self) -> Tensor:
        """The merged weight in the base's dtype, computed anew on each access.

        Code that reads ``layer.weight`` instead of calling the layer (PyTorch's fused transformer encoder, weight
        tying, dtype checks) therefore sees the adapted function, with gradients to the adapters.
        """
        return self.merged_weight().to(weight_dtype(self.base_layer))

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias of shape ``(O,)``, or None."""
        return layer_bias(self.base_layer)

    @property
    def device(self) -> torch.device:
        """Where the base weight is."""
        return weight_device(self.base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
