"""A printable account of an adapted model: what each layer holds, what is trained, and how many bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_lora.model.dequantized import kept_bytes
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.split import hosts
from lightning_lora.model.tensors import size_in_bytes, tensors
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, stored_weight


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
        name: Its name in the model.
        method: ``"lora"``; several active adapters are joined by ``+``.
        shape: ``(O, I)``.
        storage: How the base weight is stored: a dtype, or ``nf4 ...``.
        trainable: Number of trained parameters in it.
        base_bytes: Bytes of the base weight, its bias and their constants as stored, and of the weight that is kept
            dequantized if it is.
        adapter_bytes: Bytes of all its adapters.
    """

    name: str
    method: str
    shape: tuple[int, int]
    storage: str
    trainable: int
    base_bytes: int
    adapter_bytes: int


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns; ``print`` it. A 4-bit weight is counted as the weight it stands for.

    Attributes:
        layers: The adapted layers, in the model's order.
        unadapted: Embeddings and output heads that are quantized and have no adapter.
        trainable: Parameters that are trained.
        total: All parameters, adapters included.
        model_bytes: Bytes of all parameters and buffers as stored, and of weights that are kept dequantized.
    """

    layers: tuple[LayerSummary, ...]
    trainable: int
    total: int
    model_bytes: int
    unadapted: tuple[LayerSummary, ...] = ()

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.total - self.trainable

    @property
    def base_bytes(self) -> int:
        """Bytes of the adapted layers' base weights as stored."""
        return sum(layer.base_bytes for layer in self.layers)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters."""
        return sum(layer.adapter_bytes for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "method", "shape", "base", "trainable", "base bytes")
        rows = [
            (x.name, x.method, f"{x.shape[0]}x{x.shape[1]}", x.storage, f"{x.trainable:,}", f"{x.base_bytes:,}")
            for x in (*self.layers, *self.unadapted)
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.3f}%), {self.model_bytes:,} bytes in "
            "all"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe ``model``: its adapted layers, trained and frozen parameter counts, and bytes.

    Works on any model, on the meta device too; without adapters the table is empty and the totals are the model's.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    total = sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in packed)
    return Summary(
        layers=tuple(_layer(name, layer) for name, layer in adapted_layers(model).items()),
        trainable=trainable,
        total=total,
        model_bytes=size_in_bytes(tensors(model)) + kept_bytes(model),
        unadapted=tuple(_bare(name, host) for name, host in hosts(model).items() if isinstance(host, QuantizedLinear)),
    )


def _layer(name: str, layer: AdaptedLayer) -> LayerSummary:
    base = layer.base_layer
    return LayerSummary(
        name=name,
        method="+".join(layer.adapter(active).config.method for active in layer.active) or "none",
        shape=(layer.kind.out_features, layer.kind.in_features),
        storage=base.storage
        if isinstance(base, QuantizedLinear)
        else str(stored_weight(base).dtype).removeprefix("torch."),
        trainable=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        base_bytes=size_in_bytes(tensors(base)) + kept_bytes(base),
        adapter_bytes=size_in_bytes(tensors(layer.adapters)),
    )


def _bare(name: str, layer: QuantizedLinear) -> LayerSummary:
    shape = (layer.out_features, layer.in_features)
    return LayerSummary(name, "none", shape, layer.storage, 0, size_in_bytes(tensors(layer)), 0)
