"""What the active adapters of a layer add to its weight: as factors where that is a product of low rank, else dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.metrics.spectrum import Factors, spectra
from lightning_lora.metrics.update_norm import update_norm
from lightning_lora.nn.adapted import AdaptedLayer


@dataclass(frozen=True)
class Update:
    """What is known of the update ``ΔW`` of one layer.

    Attributes:
        norm: ``||ΔW||_F``.
        values: Its singular values of shape ``(K,)``; None where it has no factors, because taking them from the whole
            matrix would cost far more than training does.
    """

    norm: float
    values: Tensor | None


@torch.no_grad()
def updates(layers: Mapping[str, AdaptedLayer]) -> dict[str, Update]:
    """Measure what the active adapters add to each layer.

    A sum of low-rank updates is never formed as a matrix. That of another method (DoRA rescales the whole weight) is
    the merged weight less the base weight, one layer at a time.

    Args:
        layers: Adapted layers by name.
    """
    factors = {name: _spectral_factors(layer) for name, layer in layers.items()}
    low_rank = {name: pair for name, pair in factors.items() if pair is not None}
    values = dict(zip(low_rank, spectra(list(low_rank.values())), strict=True))
    return {
        name: Update(float(update_norm(values[name])), values[name])
        if name in values
        else Update(float(torch.linalg.vector_norm(dense_update(layer))), None)
        for name, layer in layers.items()
    }


@torch.no_grad()
def update_factors(layer: AdaptedLayer) -> Factors | None:
    """Return factors of the sum of what the active adapters add, or None where one of them does not add a product.

    Without an active adapter their rank is 0.
    """
    found = [layer.adapter(name).update_factors() for name in layer.active]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    device, kind = layer.device, layer.kind
    empty = torch.zeros(0, kind.in_features, device=device), torch.zeros(kind.out_features, 0, device=device)
    if len(pairs) < 2:
        return pairs[0] if pairs else empty
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.cat([lora_B for _, lora_B in pairs], dim=1)


def _spectral_factors(layer: AdaptedLayer) -> Factors | None:
    if len(layer.active) == 1:
        return layer.adapter(layer.active[0]).spectral_factors()
    return update_factors(layer)  # several add up: their directions count


@torch.no_grad()
def dense_update(layer: AdaptedLayer) -> Tensor:
    """Return ``ΔW``, the merged less the base weight, laid out as the layer stores it; ``float32`` at least."""
    return layer.merged_weight() - layer.base_weight()


@torch.no_grad()
def base_norms(layers: Mapping[str, AdaptedLayer]) -> dict[str, float]:
    """Return ``||W||_F`` of each weight without adapters; a quantized one is dequantized, one layer at a time."""
    return {name: float(torch.linalg.vector_norm(layer.base_weight())) for name, layer in layers.items()}
