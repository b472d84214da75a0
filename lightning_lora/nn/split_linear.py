"""A frozen linear layer with a low-rank update as two autograd nodes: ``y = x W^T + b + s (D(x) A^T) B^T``.

The first node computes ``D(x) A^T`` and keeps it and ``x`` for the backward pass. The second computes all the rest and
keeps nothing but references to weights, so recomputing a checkpointed block stops before its last frozen product.
Composed of torch's own operations, the same keeps a copy of every cast weight and, with dropout, a mask and the dropped
input, and adds the gradients of ``x`` in a pass of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn import functional as F

from lightning_lora.nn import dropout

_CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a call is made with beside tensors.

    Attributes:
        scaling: The factor ``s``.
        p: Probability of dropout.
        dtype: What is computed in, and the dtype of the result.
    """

    scaling: float
    p: float
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Frozen:
    """The layer below.

    Attributes:
        matrix: Gives ``W`` of shape ``(O, I)`` in the dtype that is computed in; called in both passes.
        bias: Of shape ``(O,)`` or None. It may be trained.
        weight: The tensor that ``W`` is read from, where there is one: it may not change between the passes.
        updated: Gives ``W + s B A`` in a dtype where there is to be one product with that, else None.
    """

    matrix: Callable[[], Tensor]
    bias: Tensor | None
    weight: Tensor | None = None
    updated: Callable[[Tensor, Tensor, float, torch.dtype], Tensor] | None = None


def adapted_linear(x: Tensor, frozen: Frozen, lora_A: Tensor, lora_B: Tensor, settings: Settings) -> Tensor:
    """Return ``x W^T + b + s (D(x) A^T) B^T``; differentiable twice.

    Weights of another dtype are cast for each product, and so is ``x`` under autocast: what is kept is ``x`` itself.

    Args:
        x: Input of shape ``(..., I)``.
        frozen: ``W`` and ``b``.
        lora_A: Down projection of shape ``(R, I)``; requires a gradient, unless none are recorded.
        lora_B: Up projection of shape ``(O, R)``.
        settings: Scaling, dropout and dtype.

    Returns:
        Tensor of shape ``(..., O)``.
    """
    if frozen.updated is not None and settings.p == 0:
        fused: Tensor = _Fused.apply(x, lora_A, lora_B, frozen.bias, frozen, settings)  # type: ignore[no-untyped-call]
        return fused
    u, seed, settings = _dropping(x, settings)
    if not torch.is_grad_enabled():
        down = _narrow(_dropped(u, _kept(u, seed, settings), settings), lora_A, settings.dtype)
        return _onto(x, down, frozen, lora_B, settings)
    down, update = _Down.apply(u, seed, lora_A, lora_B, settings)  # type: ignore[no-untyped-call]
    y: Tensor = _Onto.apply(x, down, update, frozen.bias, frozen, lora_A, lora_B, settings)  # type: ignore[no-untyped-call]
    return y


def can_split(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether :func:`adapted_linear` may stand for torch's own operations here.

    Not where something looks into the graph, transforms it or brings tensors of its own: compilers, tracers,
    ``torch.func``, forward-mode differentiation, distributed tensors. And not with a frozen ``A``, for whose gradient
    ``x`` need not be kept at all.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    # torch has no public word for these two; its own autograd functions ask in the same way.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_autocast_enabled(x.device.type) and x.dtype not in _CAST_BY_AUTOCAST:
        return False  # autocast leaves it as it is
    plain = all(_is_plain(t) for t in (x, lora_A, lora_B))
    return plain and (lora_A.requires_grad or not torch.is_grad_enabled())


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in: the input's dtype, or autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def is_plain_and_frozen(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dense weight is one that :func:`adapted_linear` may multiply with in ``dtype``."""
    plain = _is_plain(weight) and not weight.requires_grad and not weight.is_inference()
    casts = torch.is_autocast_enabled(weight.device.type) and weight.dtype in _CAST_BY_AUTOCAST
    return plain and (weight.dtype == dtype or casts)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own; one without values (to see what a step would allocate) counts as one."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


class _Down(Function):
    """``D(x) A^T``, and a stand-in without memory for ``s D(x) A^T B^T``, whose gradient is that of ``y``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor | None, lora_A: Tensor, lora_B: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        down = _narrow(_dropped(x, _kept(x, seed, settings), settings), lora_A, settings.dtype)
        ctx.save_for_backward(x, seed, down)
        ctx.lora_A, ctx.settings = lora_A, settings
        shape = (*x.shape[:-1], lora_B.shape[0])
        return down, down.new_empty_strided(shape, (0,) * len(shape))

    @staticmethod
    def backward(ctx: Any, grad_down: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``dA = dd^T D(x)``, ``dB = s dy^T d`` with ``d = D(x) A^T``; ``dx`` where dropout stands between."""
        x, seed, down = ctx.saved_tensors
        settings, wants = ctx.settings, ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        with _no_autocast(grad):
            kept = _kept(x, seed, settings)
            if wants[0] and settings.p > 0:
                grad_x = grad_down @ _in(ctx.lora_A, settings.dtype)
                grad_x = grad_x if kept is None else grad_x.mul_(kept)
            u = _dropped(x, kept, settings)
            if torch.is_grad_enabled():
                down = _narrow(u, ctx.lora_A, settings.dtype)  # what was kept knows nothing of x
            if wants[2]:
                grad_A = _rows(grad_down).t() @ _rows(u)
            if wants[3]:
                grad_B = _scaled_product(_rows(down).t(), _rows(grad), settings.scaling).t()
        return grad_x, None, grad_A, grad_B, None


class _Onto(Function):
    """``y = x W^T + b + s d B^T`` for ``d = D(x) A^T``: two products into one output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        update: Tensor,
        bias: Tensor | None,
        frozen: Frozen,
        lora_A: Tensor,
        lora_B: Tensor,
        settings: Settings,
    ) -> Tensor:
        ctx.frozen, ctx.factors, ctx.settings = frozen, (lora_A, lora_B), settings
        ctx.versions = _versions(ctx)
        return _onto(x, down, frozen, lora_B, settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``dd = s dy B``, and ``dx = dy W + dd A`` unless dropout stands between: then the first node has the rest."""
        settings, wants = ctx.settings, ctx.needs_input_grad
        lora_A, lora_B = ctx.factors
        _require_unchanged(ctx)
        grad_x = None
        with _no_autocast(grad):
            rows = _rows(grad)
            grad_down = _narrow(grad, lora_B.t(), settings.dtype, settings.scaling)
            if wants[0]:
                grad_x = rows @ ctx.frozen.matrix()
                if settings.p == 0:
                    grad_x.addmm_(_rows(grad_down), _in(lora_A, settings.dtype))
                grad_x = _unrolled(grad_x, grad)
            grad_bias = rows.sum(0) if wants[3] else None
        return grad_x, grad_down, grad, grad_bias, None, None, None, None


class _Fused(Function):
    """``y = x (W + s B A)^T + b``: one product, with a weight that is made for each pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        frozen: Frozen,
        settings: Settings,
    ) -> Tensor:
        assert frozen.updated is not None
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.frozen, ctx.settings = frozen, settings
        weight = frozen.updated(lora_A, lora_B, settings.scaling, settings.dtype)
        return F.linear(_in(x, settings.dtype), weight, None if bias is None else _in(bias, settings.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``dx = dy (W + s B A)``, ``dA = s (dy B)^T x``, ``dB = s dy^T (x A^T)``."""
        x, lora_A, lora_B = ctx.saved_tensors
        settings, wants, frozen = ctx.settings, ctx.needs_input_grad, ctx.frozen
        grad_x = grad_A = grad_B = None
        with _no_autocast(grad):
            rows, u = _rows(grad), _rows(_in(x, settings.dtype))
            grad_down = _narrow(rows, lora_B.t(), settings.dtype, settings.scaling)
            if wants[0] and torch.is_grad_enabled():  # the kernel has no derivative
                grad_x = _unrolled(rows @ frozen.matrix() + grad_down @ _in(lora_A, settings.dtype), grad)
            elif wants[0]:
                grad_x = _unrolled(rows @ frozen.updated(lora_A, lora_B, settings.scaling, settings.dtype), grad)
            if wants[1]:
                grad_A = grad_down.t() @ u
            if wants[2]:
                down = _narrow(u, lora_A, settings.dtype)
                grad_B = _scaled_product(down.t(), rows, settings.scaling).t()
            grad_bias = rows.sum(0) if wants[3] else None
        return grad_x, grad_A, grad_B, grad_bias, None, None


def _dropping(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None, Settings]:
    """The input of ``A``, and what to draw its mask from if that is still to be done."""
    if settings.p == 0:
        return x, None, settings
    if not dropout.serves(x.device):
        return F.dropout(x, settings.p), None, settings
    kept = Settings(settings.scaling / (1 - settings.p), settings.p, settings.dtype)
    return x, dropout.draw_seed(), kept


def _onto(x: Tensor, down: Tensor, frozen: Frozen, lora_B: Tensor, settings: Settings) -> Tensor:
    dtype, bias = settings.dtype, frozen.bias
    y = F.linear(_rows(_in(x, dtype)), frozen.matrix(), None if bias is None else _in(bias, dtype))
    y.addmm_(_rows(down), _in(lora_B, dtype).t(), alpha=settings.scaling)
    return _unrolled(y, x)


def _dropped(x: Tensor, kept: Tensor | None, settings: Settings) -> Tensor:
    """What a mask keeps of ``x``, in the mask's place unless a graph needs both."""
    x = _in(x, settings.dtype)
    if kept is None:
        return x
    return x * kept if torch.is_grad_enabled() else kept.mul_(x)


def _kept(x: Tensor, seed: Tensor | None, settings: Settings) -> Tensor | None:
    return None if seed is None else dropout.kept(seed, x.shape, settings.p, settings.dtype, x.device)


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a cast to the same dtype takes a microsecond


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unrolled(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in the leading shape of a tensor."""
    return rows if like.dim() == 2 else rows.view(*like.shape[:-1], rows.shape[-1])


def _narrow(x: Tensor, factor: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``s x F^T`` of shape ``(..., R)`` for a factor of shape ``(R, I)``.

    In bfloat16 a product with few rows is faster on CPUs than one with few columns (by 1.7), and what is multiplied
    with its result reads whole columns of that. In float32 little is to be gained, and the order of the sums stays the
    one that plain operations have.
    """
    factor, rows = _in(factor, dtype), _rows(x)
    if dtype == torch.bfloat16:
        return _unrolled(_scaled_product(factor, rows.t(), scaling).t(), x)
    return _unrolled(_scaled_product(rows, factor.t(), scaling), x)


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``s a b`` in one operation: with ``beta=0`` what is added to is not read."""
    if scaling == 1:
        return a @ b
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Backward runs under the autocast of whoever calls it, which need not be that of the forward pass."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _versions(ctx: Any) -> tuple[int, ...]:
    """How often each weight that is read again in the backward pass has been written to."""
    return tuple(weight._version for weight in (*ctx.factors, ctx.frozen.weight) if weight is not None)


def _require_unchanged(ctx: Any) -> None:
    """Raise what torch raises for a saved tensor that was written to."""
    now = _versions(ctx)
    if now != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: lora_A, "
            f"lora_B and weight of an adapted layer are at versions {now}; expected {ctx.versions}. Was there an "
            "optimizer step, or were weights loaded, between the forward and the backward pass?"
        )
