"""What may stand under an adapter: a plain ``nn.Linear``, or a frozen linear layer that stores its weight in few bits.

The contract of the second kind is declared here and implemented elsewhere, so that adapters, merging and counting never
need to know how a weight is stored.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer ``y = x W^T + b`` whose ``W`` of shape ``(O, I)`` is stored in few bits.

    Attributes:
        in_features: ``I``.
        out_features: ``O``.
        bias: Parameter of shape ``(O,)`` or None.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @property
    @abstractmethod
    def storage(self) -> str:
        """How the weight is stored, in a word or two, for people: ``nf4 double-quantized``."""

    @property
    @abstractmethod
    def merge_dtype(self) -> torch.dtype:
        """The dtype the weight would have in this model if it were not quantized."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the packed weight is."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return ``W`` of shape ``(O, I)`` in ``dtype``: exactly the weight that :meth:`forward` multiplies with."""


BaseLayer = nn.Linear | QuantizedLinear
"""What an adapter can be put on."""

_HOOKS = tuple(key for key in vars(nn.Module()) if "hook" in key and "state_dict" not in key)
"""Where ``nn.Module`` keeps what runs around ``forward`` and ``backward``."""

Adopter = Callable[[nn.Module], BaseLayer]
_adopters: dict[str, Adopter] = {}


def register_adopter(class_path: str, adopter: Adopter) -> None:
    """Register what turns layers of a foreign class, given by path and not imported, into base layers."""
    _adopters[class_path] = adopter


def as_base(layer: nn.Module) -> BaseLayer:
    """Return ``layer`` as something an adapter can stand on, a foreign quantized layer with its codes as they are.

    Raises:
        TypeError: If the layer is none; the message says why.
    """
    if isinstance(layer, QuantizedLinear):
        return layer
    adopter = next((_adopters[p] for p in map(_class_path, type(layer).__mro__) if p in _adopters), None)
    if adopter is not None:
        return adopter(layer)
    reason = why_not_linear(layer)
    if reason is not None:
        raise TypeError(reason)
    assert isinstance(layer, nn.Linear)
    return layer


def why_not_linear(layer: nn.Module) -> str | None:
    """Say why no adapter can stand on ``layer``, or return None where one can."""
    if isinstance(layer, QuantizedLinear) or any(_class_path(c) in _adopters for c in type(layer).__mro__):
        return None
    name = type(layer).__name__
    if not isinstance(layer, nn.Linear):
        return f"{name} is no linear layer"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "it belongs to nn.MultiheadAttention, which reads its weight without calling it"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized (torch.nn.utils.parametrize), so a merge could not write it back"
    if type(layer).forward is not nn.Linear.forward:
        return f"{name} overrides nn.Linear.forward, so x W^T + b may not be what it computes"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by accelerate? remove_hook_from_module(model, recurse=True))"
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "a hook computes its weight (weight_norm, spectral_norm, prune); remove that first"
    if is_lazy(layer.weight):
        return "it is lazy and has no shape yet; run the model once first"
    return None


def dense_weight(layer: BaseLayer, dtype: torch.dtype) -> Tensor:
    """Return the layer's weight of shape ``(O, I)`` in ``dtype``, the live tensor where it has that already."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    return layer.weight.detach().to(dtype)


def weight_device(layer: BaseLayer) -> torch.device:
    """Where the layer's weight is."""
    return layer.device if isinstance(layer, QuantizedLinear) else layer.weight.device


def weight_dtype(layer: BaseLayer) -> torch.dtype:
    """The dtype a merged weight takes unless told otherwise: what it is stored in, or would be if not quantized."""
    return layer.merge_dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype


def with_weight(layer: BaseLayer, weight: Tensor) -> nn.Linear:
    """Return a plain linear layer with ``weight`` and the bias of ``layer``, which is left untouched.

    A dense layer's own class, hooks and mode are kept, so that whatever the user hung on it stays.
    """
    if isinstance(layer, QuantizedLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        plain = copy.copy(layer)
        plain._parameters = dict(layer._parameters)  # a shallow copy shares the dict; this one gets its own weight
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias: nn.Parameter | None = layer.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    plain.register_parameter("bias", bias)
    return plain.train(layer.training)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, present and future, in the place of its own.

    The very dicts are shared, so that the handles users hold still remove them.
    """
    for key in _HOOKS:
        vars(target)[key] = vars(source)[key]


def hand_over_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, which keeps none."""
    share_hooks(source, target)
    share_hooks(nn.Module(), source)


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
