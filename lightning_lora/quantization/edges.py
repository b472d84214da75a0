"""The edges of a model, its embeddings and output heads, in 8 bit: with adapters on them or without.

They are a large part of a model whose other layers are in 4 bit. 8 bit loses about 1% of them, a tenth of what
4 bit does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.errors import QuantizationError, listing
from lightning_lora.model.split import named_layers
from lightning_lora.model.targets import output_heads
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, adopter_of, stored_weight
from lightning_lora.nn.kinds import why_not_adaptable
from lightning_lora.quantization.config import Int8Config
from lightning_lora.quantization.formats import linear_class

EMBEDDINGS = {"int8": Int8Config()}
"""How edges can be stored, by the word for it."""


def check_embeddings(embeddings: str | None) -> None:
    """Raise ``ValueError`` unless that is a word for how edges are stored."""
    if embeddings is not None and embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings must be None or one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")


def edges(
    model: nn.Module, train: Collection[str] | None = None, *, values: bool = True
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Find what ``embeddings="int8"`` stores: every embedding, and the heads that ``"all-linear"`` leaves.

    Args:
        model: With adapters or without.
        train: Names of the modules that are going to be trained whole; None takes what is trained now.
        values: Whether to look at the weights, which a model may not have yet.

    Returns:
        Layers that are not quantized yet by name, adapted ones as such, and those that stay as they are, with the
        reason.

    Raises:
        QuantizationError: If there is none at all, or one shares its weight with another layer.
    """
    heads = set(output_heads(model))
    under = {layer.base_layer for layer in model.modules() if isinstance(layer, AdaptedLayer)}
    layers = {name: layer for name, layer in named_layers(model) if layer not in under}
    found = {name: layer for name, layer in layers.items() if name in heads or _is_embedding(layer)}
    if not found:
        raise QuantizationError(f"{type(model).__name__} has no embedding and no output head; drop embeddings='int8'")
    kept = {name: reason for name, layer in found.items() if (reason := _why_not(name, layer, train, values=values))}
    chosen = {
        name: layer
        for name, layer in found.items()
        if name not in kept and not isinstance(base_of(layer), QuantizedLinear)
    }
    _refuse_tied(model, chosen)
    return chosen, kept


def _is_embedding(layer: nn.Module) -> bool:
    if isinstance(layer, QuantizedLinear):
        return layer.kind.name == "embedding"
    return isinstance(layer, nn.Embedding) or (isinstance(layer, AdaptedLayer) and layer.kind.name == "embedding")


def base_of(layer: nn.Module) -> nn.Module:
    """The layer under the adapters, or the layer itself where it has none."""
    return layer.base_layer if isinstance(layer, AdaptedLayer) else layer


def _why_not(name: str, layer: nn.Module, train: Collection[str] | None, *, values: bool) -> str | None:
    """Why an edge stays dense, or None if it can be quantized or is already."""
    base = base_of(layer)
    if isinstance(base, QuantizedLinear):
        return None
    if adopter_of(base) is not None:
        return "it is quantized already"
    if not isinstance(base, nn.Linear | nn.Embedding):
        return f"INT8 holds linear layers and embeddings, and this is a {type(base).__name__}"
    reason = why_not_adaptable(base)
    trained = base.weight.requires_grad if train is None else any(f"{name}.".startswith(f"{x}.") for x in train)
    if reason is None and trained:
        reason = "it is trained whole"
    weight, held = base.weight.detach(), linear_class(EMBEDDINGS["int8"])
    reason = reason or held.refusal(weight, weight.device)
    return held.refusal_of_values(weight) if reason is None and values else reason


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a weight that another layer holds as well: each would be quantized, and merged, by itself."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(f"{name}.{key}")
    shared = {name: holders[id(stored_weight(base_of(layer)))] for name, layer in layers.items()}
    for name, names in shared.items():
        if len(names) > 1:
            raise QuantizationError(
                f"the weight of {name} is one parameter with another ({listing(names)}), and 8 bit would untie them: "
                "two copies would take as much memory as the one in 16 bit. Drop embeddings='int8', or untie them first"
            )
