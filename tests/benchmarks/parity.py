"""Is what was timed the right computation? One adapted layer against the same layer written out in ``float64``."""

from __future__ import annotations

import torch
from contenders import ALPHA_OVER_R, Adapted, Case, Weights
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.nn import dropout

SEED = 20

TOLERANCE = {
    # Rounding to bf16 is off by at most 2^-8 of a value, 2^-8/sqrt(3) in the norm of many. Independent roundings add in
    # squares, so 2^-7 has room for a dozen of them in a row; the paths here have up to six: W x, B, A, x A^T, the sum,
    # and with dropout the 1/(1-p) that is itself rounded.
    torch.bfloat16: 2**-7,
    # Sums of 2048 float32 products, in whichever order the kernels choose: about sqrt(2048) * 2^-24.
    torch.float32: 1e-5,
}


def check(case: Case, name: str, adapted: Adapted, weights: Weights, W: Tensor, x: Tensor, grad: Tensor) -> None:
    """Assert that output, loss and all three gradients are those of the equation, and that the base gets none.

    Args:
        case: What is compared; its dtype decides the tolerance.
        name: Of the contender, for the message.
        adapted: The layer under test.
        weights: The master weights of the adapter.
        W: The base weight that is multiplied with: after quantization, if it is quantized.
        x: Input of shape ``(T, I)``.
        grad: Gradient of the loss ``<y, grad>`` at the output ``(T, O)``.
    """
    keep = _kept(case, adapted, x)
    expected = _reference(case, weights, W, x, grad, keep)
    got = _computed(adapted, x, grad)
    for what, reference in expected.items():
        error = float((got[what].double() - reference).norm() / reference.norm())
        limit = TOLERANCE[case.dtype]
        assert error <= limit, f"{case}: {what} of {name} is off by {error:.2e} of its norm, tolerance {limit:.2e}"
    trained = {adapted.A, adapted.B}
    assert all(p.grad is None for p in adapted.layer.parameters() if p not in trained), f"{name} trains its base"


def _kept(case: Case, adapted: Adapted, x: Tensor) -> Tensor:
    """The mask the layer will draw under ``SEED``, times ``1 / (1 - p)``: dropout in the dtype the layer drops in."""
    if not case.dropout:
        return torch.ones((), dtype=torch.float64)
    torch.manual_seed(SEED)
    if not _is_peft(adapted):
        return dropout.kept(dropout.draw_seed(), x.shape, case.dropout, torch.float64, x.device) / (1 - case.dropout)
    drops_in = torch.promote_types(x.dtype, adapted.A.dtype)
    return (F.dropout(torch.ones(x.shape, dtype=drops_in), case.dropout) != 0).double() / (1 - case.dropout)


def _is_peft(adapted: Adapted) -> bool:
    return type(adapted.layer).__module__.startswith("peft.")


def _reference(case: Case, weights: Weights, W: Tensor, x: Tensor, grad: Tensor, keep: Tensor) -> dict[str, Tensor]:
    W, A, B, x, grad = (t.detach().double() for t in (W, weights.A, weights.B, x, grad))
    dropped, s = x * keep, ALPHA_OVER_R
    y = x @ W.T + s * (dropped @ A.T) @ B.T
    return {
        "output": y,
        "loss": (y * grad).sum(),
        "gradient of x": grad @ W + keep * (s * (grad @ B) @ A),
        "gradient of A": s * (grad @ B).T @ dropped,
        "gradient of B": s * grad.T @ (dropped @ A.T),
    }


def _computed(adapted: Adapted, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(SEED)
    y: Tensor = adapted.layer(x)
    assert y.dtype == x.dtype
    y.backward(grad)
    gradients = {"gradient of x": x.grad, "gradient of A": adapted.A.grad, "gradient of B": adapted.B.grad}
    missing = [what for what, gradient in gradients.items() if gradient is None]
    assert not missing, f"no {missing[0]}"
    found = {what: gradient.clone() for what, gradient in gradients.items() if gradient is not None}
    adapted.A.grad = adapted.B.grad = None
    return {"output": y.detach(), "loss": (y.detach().double() * grad.double()).sum(), **found}
