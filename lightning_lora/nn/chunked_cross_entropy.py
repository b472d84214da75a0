"""The loss of a large vocabulary without its logits: head and cross-entropy over a few tokens at a time.

For 4096 tokens and a vocabulary of 128,000, logits and their gradient take 5 GiB; a chunk of 1024 tokens a quarter of
that, and nothing of it outlives the chunk. The gradients of a chunk are computed right after its loss, so that nothing
is computed twice either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_cross_entropy(
    hidden: Tensor,
    head: nn.Module | Tensor,
    labels: Tensor,
    *,
    chunk: int = 1024,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``cross_entropy(head(hidden), labels)``, the mean over the tokens that are not ignored, chunk by chunk.

    Gradients reach ``hidden`` and whatever is trainable in the head: its weight, or its adapters. They are computed in
    the forward pass, and scaled in the backward pass; there is no second derivative. Each chunk's logits become
    ``float32``. Under ``torch.compile`` the graph ends here and goes on behind.

    Args:
        hidden: What the head takes, of shape ``(..., H)``.
        head: A layer that takes each token by itself (adapted, quantized or plain), or a weight of shape ``(V, H)``.
        labels: Classes of shape ``(...)``. In a language model, already shifted.
        chunk: How many tokens have logits at once.
        ignore_index: The label of tokens that do not count.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.

    Returns:
        A scalar in ``float32`` (``float64`` for such a ``hidden``); NaN if no token counts, as in torch.

    Raises:
        ValueError: If the shapes do not fit, ``chunk`` is below 1, or ``label_smoothing`` is not within 0 and 1.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit hidden of shape {tuple(hidden.shape)}: they need its "
            f"shape without the last axis, {tuple(hidden.shape[:-1])}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be within 0 and 1, got {label_smoothing}")
    trained = [head] if isinstance(head, Tensor) else list(head.parameters())
    trained = [parameter for parameter in trained if parameter.requires_grad]

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(
            logits.to(wide), labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
        )

    count = (labels != ignore_index).sum()
    mean: Tensor = _chunked(hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), count, loss, chunk, trained)
    return mean


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _chunked(
    hidden: Tensor,
    labels: Tensor,
    count: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
    trained: list[Tensor],
) -> Tensor:
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        total: Tensor = _LossAndGradients.apply(hidden, labels, count, loss, chunk, *trained)  # type: ignore[no-untyped-call]
        return total
    pieces = zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    return torch.stack([loss(*piece) for piece in pieces]).sum() / count


class _LossAndGradients(torch.autograd.Function):
    """``sum / count``. Kept are the gradients of the *sum*: those of the mean would be lost to ``float16``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        count: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        *trained: Tensor,
    ) -> Tensor:
        ctx.dtypes = [parameter.dtype for parameter in trained]
        grad_hidden = torch.empty_like(hidden)
        grads: list[Tensor | None] = [None] * len(trained)
        sums = []
        for start in range(0, max(len(labels), 1), chunk):  # none is a chunk too: its mean is NaN
            piece = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[piece].detach().requires_grad_()
                sums.append(loss(part, labels[piece]))
                found = torch.autograd.grad(sums[-1], (part, *trained), allow_unused=True)
            sums[-1] = sums[-1].detach()
            grad_hidden[piece] = found[0]
            grads = [_added(grad, more) for grad, more in zip(grads, found[1:], strict=True)]
        ctx.save_for_backward(count, grad_hidden, *grads)
        return torch.stack(sums).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, grad_hidden, *grads = ctx.saved_tensors
        scale = grad / count
        scaled = [
            None if each is None else (each * scale).to(dtype) for each, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (grad_hidden * scale).to(grad_hidden.dtype), None, None, None, None, *scaled


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum of the chunks' gradients, in ``float32`` at least: one in half precision would stop growing."""
    if more is None:
        return total
    wide = more.to(torch.promote_types(more.dtype, torch.float32))
    return wide if total is None else total.add_(wide)
