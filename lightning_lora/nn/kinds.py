"""Which layers adapters can stand on, and of which kind each is."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_lora.nn.base import QuantizedLinear, adopter_of, class_paths, layer_bias
from lightning_lora.nn.conv import CONVOLUTIONS, ConvKind
from lightning_lora.nn.embedding import EmbeddingKind
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.linear import LinearKind

_HF_CONV1D = "transformers.pytorch_utils.Conv1D"


def kind_of(layer: nn.Module) -> Kind:
    """Return how ``layer`` applies its weight.

    Raises:
        TypeError: If it is of no kind known here.
    """
    if isinstance(layer, nn.Linear):
        return LinearKind(layer.in_features, layer.out_features)
    if isinstance(layer, QuantizedLinear | StackedWeight):
        return layer.kind
    if isinstance(layer, nn.Embedding):
        return EmbeddingKind(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx)
    if isinstance(layer, CONVOLUTIONS):
        return ConvKind.of(layer)
    if _HF_CONV1D in class_paths(layer):
        foreign: Any = layer
        return LinearKind(foreign.nx, foreign.nf, transposed=True)
    raise TypeError(f"{type(layer).__name__} is no layer an adapter can stand on")


def has_kind(layer: nn.Module) -> bool:
    """Whether ``layer`` is linear, an embedding, a convolution or a stack of experts, adaptable or not."""
    known = isinstance(layer, (nn.Linear, QuantizedLinear, nn.Embedding, StackedWeight, *CONVOLUTIONS))
    return known or adopter_of(layer) is not None or _HF_CONV1D in class_paths(layer)


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer: what ``"all-linear"`` means."""
    if isinstance(layer, QuantizedLinear):
        return layer.kind.name == "linear"
    return has_kind(layer) and not isinstance(layer, (nn.Embedding, StackedWeight, *CONVOLUTIONS))


def as_base(layer: nn.Module) -> nn.Module:
    """Return ``layer`` as something an adapter can stand on, a foreign quantized layer with its codes as they are.

    Raises:
        TypeError: If the layer is none; the message says why.
    """
    adopter = adopter_of(layer)
    if adopter is not None and not isinstance(layer, QuantizedLinear):
        return adopter(layer)
    reason = why_not_adaptable(layer)
    if reason is not None:
        raise TypeError(reason)
    return layer


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Say why no adapter can stand on ``layer``, or return None where one can."""
    if isinstance(layer, QuantizedLinear) or adopter_of(layer) is not None:
        return None
    name = type(layer).__name__
    if not has_kind(layer):
        return f"{name} is no linear layer, embedding or convolution"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "it belongs to a changed nn.MultiheadAttention, which reads its weight without calling it"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized (torch.nn.utils.parametrize), so a merge could not write it back"
    own = next((kind for kind in (nn.Linear, nn.Embedding, *CONVOLUTIONS) if isinstance(layer, kind)), None)
    if own is not None and type(layer).forward is not own.forward:
        return f"{name} overrides {own.__name__}.forward, so its weight may not act as in one"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by accelerate? remove_hook_from_module(model, recurse=True))"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "a hook computes its weight (weight_norm, spectral_norm, prune); remove that first"
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
        return "it is lazy and has no shape yet; run the model once first"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"max_norm={layer.max_norm} rescales its weight at each call, so the base would not stay what it is"
    if layer_bias(layer) is None and getattr(layer, "bias", None) is not None:
        return "its bias is no parameter"
    return None
