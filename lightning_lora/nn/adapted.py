"""The layer that takes another's place: the frozen base below, named adapters on top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, CheckpointError
from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.base import (
    QuantizedLinear,
    dense_weight,
    layer_bias,
    stored_weight,
    weight_device,
    weight_dtype,
    weight_pieces,
)
from lightning_lora.nn.fingerprint import is_held
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.pieces import PieceMerger
from lightning_lora.nn.rows import Rows


class AdaptedLayer(nn.Module):
    """A layer with adapters: ``y = base_layer(x)``, then each active adapter in turn.

    Attributes:
        base_layer: The frozen layer. Its own attributes (``in_features``, ``stride``, ``padding_idx``) are those of the
            adapted layer too.
        kind: How the base layer applies its weight.
        adapters: Adapters by name.
        base_lacks: Name of the adapter whose start was taken off the base weight before it was quantized, or None.
            Where that adapter is not active its start is put back, so that the others stand on the whole weight.
        rows: What computes instead for the time being, row by row of the batch; None means the active adapters.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self._in_order: tuple[nn.Module, ...] = ()
        self.base_lacks: str | None = None
        self.rows: Rows | None = None
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the base layer's output, changed by the active adapters."""
        if self.rows is not None and self.rows.mixed:
            routed: Tensor = self.rows.forward(self, x)
            return routed
        adapters = self._computing_adapters()
        if self.base_lacks is not None and self.base_lacks not in self.computing:
            y: Tensor = self.adapter(self.base_lacks).put_back(self.base_layer(x), x)
        elif adapters and isinstance(adapters[0], Adapter):  # not something that was wrapped around it
            y = adapters[0].over(x, self.base_layer)
            adapters = adapters[1:]
        else:
            y = self.base_layer(x)
        for adapter in adapters:
            y = adapter(x, y, self.base_layer)
        return y

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that compute, in order; empty means the plain base layer."""
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self._active = names
        self._in_order = tuple(self.adapters[name] for name in names)

    def put(self, name: str, adapter: Adapter) -> None:
        """Hold ``adapter`` under ``name``, in the place of one that is held so already."""
        self.adapters[name] = adapter
        self.active = self.active

    def adapter(self, name: str) -> Adapter:
        """Return the adapter called ``name``."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def base_weight(self) -> Tensor:
        """Return the weight without adapters, as the base stores it, in ``float32`` at least."""
        weight = self._stored_weight()
        return weight if self.base_lacks is None else self.adapter(self.base_lacks).restored(weight)

    def merged_weight(self) -> Tensor:
        """Return the weight that computes what the active adapters compute, without dropout, as the base stores it.

        Summed in ``float32`` at least, whatever the base is stored in, so that a small update is not lost to rounding.

        Raises:
            AdapterError: If rows go through different adapters, so that there is no such weight.
        """
        if self.rows is not None and self.rows.mixed:
            raise AdapterError(
                "rows are routed to different adapters, which no one weight computes; leave routed() first"
            )
        weight = self._stored_weight() if self.base_lacks in self.computing else self.base_weight()
        for name in self.computing:
            weight = self.adapter(name).merged(weight)
        return weight

    @torch.no_grad()
    def merged_pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of :meth:`merged_weight` in order, in ``dtype`` and without gradients.

        On a CPU they come a few at a time where all active adapters can merge so, else all at once.

        Raises:
            AdapterError: If rows of the batch go through different adapters, so that there is no such weight.
        """
        mergers = self._piece_mergers()
        if mergers is None:
            with torch.autocast(self.device.type, enabled=False):  # it would round B A to half precision
                whole = self.merged_weight().to(dtype)
            yield whole
            return
        begin = 0
        for piece in weight_pieces(self.base_layer, self._sum_dtype()):
            rows = slice(begin, begin + len(piece))
            with torch.autocast(self.device.type, enabled=False):
                for merge in mergers:
                    piece = merge(piece, rows)
            begin = rows.stop
            yield piece.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The merged weight in the base's dtype, computed anew on each access.

        Code that reads ``layer.weight`` instead of calling the layer (PyTorch's fused transformer encoder, weight
        tying, dtype checks) therefore sees the adapted function, with gradients to the adapters. While rows go through
        different adapters it has a shape and a dtype but no values: the fused encoder then calls the layer.
        """
        if self.rows is not None and self.rows.mixed:
            return torch.empty(self._shape(), dtype=weight_dtype(self.base_layer), device="meta")
        return self.merged_weight().to(weight_dtype(self.base_layer))

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias of shape ``(O,)``, or None."""
        return layer_bias(self.base_layer)

    @property
    def device(self) -> torch.device:
        """Where the base weight is."""
        return weight_device(self.base_layer)

    @property
    def computing(self) -> tuple[str, ...]:
        """The adapters that compute now, for all rows: the active ones, and none within ``disabled`` or ``routed``."""
        return self.active if self.rows is None else ()

    def _computing_adapters(self) -> tuple[nn.Module, ...]:
        """The adapters of :attr:`computing`. While a graph is compiled no name is read: it would hold for that name.

        So one graph serves all adapters of one config, and all equal layers, whatever is active in them. Outside of
        graphs they are looked up, because code that wraps or replaces modules finds them by name.
        """
        if torch.compiler.is_compiling():
            return self._in_order if self.rows is None else ()
        return tuple(self.adapters[name] for name in self.computing)

    def _shape(self) -> tuple[int, ...]:
        quantized = isinstance(self.base_layer, QuantizedLinear)
        kind = self.kind
        return (kind.out_features, kind.in_features) if quantized else tuple(stored_weight(self.base_layer).shape)

    def _stored_weight(self) -> Tensor:
        return dense_weight(self.base_layer, self._sum_dtype())

    def _sum_dtype(self) -> torch.dtype:
        return torch.promote_types(weight_dtype(self.base_layer), torch.float32)

    def _piece_mergers(self) -> list[PieceMerger] | None:
        """What merges the active adapters, or None where only whole weights can be."""
        lacking = self.base_lacks is not None and self.base_lacks not in self.computing
        if not self.computing or lacking or self.device.type != "cpu":
            return None
        if not all(map(is_held, self.base_layer.parameters(recurse=False))):
            return None
        mergers = [self.adapter(name).piece_merger() for name in self.computing]
        found = [merger for merger in mergers if merger is not None]
        return found if len(found) == len(mergers) else None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """See that an adapter and a base that lacks its start are of one piece, before either is loaded."""
        if self.base_lacks is not None and not self._brings_its_base(state_dict, f"{prefix}base_layer."):
            path = f"{prefix}adapters.{self.base_lacks}."
            state = {key.removeprefix(path): value for key, value in state_dict.items() if key.startswith(path)}
            if not self.adapter(self.base_lacks).stands_on_same_base(state):
                raise CheckpointError(
                    f"{path[:-1]} was trained over a base that was quantized without its starting values, and those "
                    "computed here differ (another device, library or number of threads decomposes with other "
                    "rounding). Build the module with lightning_lora.load_from_checkpoint(...), which quantizes around "
                    "the saved values; it can then be trained on with fit(module, ckpt_path=...)"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _brings_its_base(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Whether a state dict holds another base weight than the one that is here."""
        own = self.base_layer.state_dict()
        saved = {key: state_dict[f"{prefix}{key}"] for key in own if f"{prefix}{key}" in state_dict}
        return any(tensor.data_ptr() != own[key].data_ptr() for key, tensor in saved.items())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_layer")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)
