"""Stacked experts in the grouped products of Hugging Face transformers: ``x W_e^T + s (x A_e^T) B_e^T``, no sum formed.

Other code around experts reads weights, and gets ``W_e + s B_e A_e`` of all of them, with a gradient of that size. What
the default of transformers reads is multiplied at once, rows grouped by expert, so that the update can be multiplied
beside it: a stack costs no copy and no gradient, and nothing is rounded into its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, dense_weight, weight_dtype, weight_shape
from lightning_lora.nn.expert_lora import ExpertLoRA
from lightning_lora.nn.experts import ExpertsKind

_GROUPED = "grouped_mm"
_PRODUCT = getattr(torch, "_grouped_mm", None)
"""What ``torch.nn.functional.grouped_mm`` calls, where there is one."""
_ALIGNED = 16
"""Bytes that rows of its operands have to begin at multiples of."""


def multiplies_groups(module: nn.Module) -> bool:
    """Whether the module's code multiplies with its stacks in groups, and torch has a product for that."""
    config = getattr(module, "config", None)
    grouped = getattr(config, "_experts_implementation", None) == _GROUPED
    return grouped and _PRODUCT is not None and hasattr(F, "grouped_mm") and not torch.compiler.is_compiling()


@contextmanager
def reading(module: nn.Module, layers: Mapping[str, nn.Module], read: Callable[[nn.Module], Tensor]) -> Iterator[None]:
    """Let a module's code read ``layers`` by their names within the context.

    Args:
        module: One that :func:`multiplies_groups`, without parameters of these names.
        layers: Stacks with adapters or without.
        read: What gives the adapted weight of a stack, for whatever else its code does with it.
    """
    vars(module).update({name: _grouped(layer, read) or read(layer) for name, layer in layers.items()})
    try:
        yield
    finally:
        for name in layers:
            del vars(module)[name]


def _grouped(layer: nn.Module, read: Callable[[nn.Module], Tensor]) -> GroupedStack | None:
    """Return what stands for the weight of a stack, or None where it cannot."""
    if not isinstance(layer, AdaptedLayer):
        return None
    adapters = [layer.adapter(name) for name in layer.computing]
    size = weight_dtype(layer.base_layer).itemsize
    serves = all(isinstance(adapter, ExpertLoRA) and adapter.config.r * size % _ALIGNED == 0 for adapter in adapters)
    return GroupedStack(layer, read) if serves else None


class GroupedStack:
    """A stack of adapted experts in the place of its weight. No tensor, yet torch's functions take it for one.

    Args:
        layer: With adapters that are :class:`~lightning_lora.nn.expert_lora.ExpertLoRA`.
        read: Gives the adapted weight.
        swapped: What this is with the last two axes swapped, if it is.
    """

    def __init__(
        self, layer: AdaptedLayer, read: Callable[[nn.Module], Tensor], *, swapped: GroupedStack | None = None
    ) -> None:
        self._layer, self._read, self._swapped = layer, read, swapped
        self._wholes: dict[bool, Tensor] = {}

    @property
    def _is_swapped(self) -> bool:
        return self._swapped is not None

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        experts, rows, columns = weight_shape(self._layer.base_layer)
        return torch.Size((experts, columns, rows) if self._is_swapped else (experts, rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return weight_dtype(self._layer.base_layer)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._layer.device

    def transpose(self, dim0: int, dim1: int) -> GroupedStack | Tensor:
        """Swap two axes."""
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            return self.whole().transpose(dim0, dim1)
        return self._swapped or GroupedStack(self._layer, self._read, swapped=self)

    def whole(self) -> Tensor:
        """Return the adapted weight, read once for all that a call does with gradients, and once without."""
        if self._swapped is not None:
            return self._swapped.whole().mT
        grad = torch.is_grad_enabled()
        if grad not in self._wholes:
            self._wholes[grad] = self._read(self._layer)
        return self._wholes[grad]

    def multiplied(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return rows of ``x``, those of each expert together, times the adapted weight of their expert.

        Args:
            x: Of shape ``(S, I)``.
            offs: Where the rows of each expert end, ``int32`` of shape ``(E,)``.
        """
        base = self._layer.base_layer
        y: Tensor = (
            _OverPacked.apply(x, offs, base, self.dtype, self._is_swapped)  # type: ignore[no-untyped-call]
            if isinstance(base, QuantizedLinear)
            else F.grouped_mm(x, _oriented(base, self.dtype, self._is_swapped), offs=offs)
        )
        for name in self._layer.computing:
            adapter = self._layer.adapter(name)
            assert isinstance(adapter, ExpertLoRA)
            A, B = adapter.lora_A.to(self.dtype), adapter.lora_B.to(self.dtype)
            down = F.grouped_mm(x, A.mT, offs=offs)
            y = torch.add(y, F.grouped_mm(down, B.mT, offs=offs), alpha=adapter.config.scale)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {key: value for key, value in (kwargs or {}).items() if value is not None}
        if func is _PRODUCT and len(args) == 2 and isinstance(args[1], cls) and given.keys() == {"offs"}:
            stack, kind = args[1], args[1]._layer.kind
            assert isinstance(kind, ExpertsKind)
            if stack._is_swapped != kind.transposed:  # the weights are multiplied from the right
                return stack.multiplied(args[0], given["offs"])
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class _OverPacked(Function):
    """``x W_e^T`` over a stack in few bits, which is dequantized again in the backward pass: nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offs: Tensor, base: nn.Module, dtype: torch.dtype, swapped: bool) -> Tensor:
        ctx.save_for_backward(offs)
        ctx.base, ctx.dtype, ctx.swapped = base, dtype, swapped
        return F.grouped_mm(x, _oriented(base, dtype, swapped), offs=offs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``dx = dy W_e``."""
        (offs,) = ctx.saved_tensors
        grad_x = F.grouped_mm(grad.contiguous(), _oriented(ctx.base, ctx.dtype, not ctx.swapped), offs=offs)
        return grad_x, None, None, None, None


def _oriented(base: nn.Module, dtype: torch.dtype, swapped: bool) -> Tensor:
    """The weight of a stack as it stands in a product from the right."""
    weight = dense_weight(base, dtype)
    return weight.mT if swapped else weight
