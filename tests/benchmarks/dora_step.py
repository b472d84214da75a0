"""Time of one training step of one layer under DoRA, beside LoRA's, ours and PEFT's, in one process on the CPU.

A step is the forward pass, the backward pass and an optimizer step (SGD over the adapter alone) of a layer of
2048 -> 2048 features with rank 16 on 512 tokens whose gradient is wanted too. The optimizer belongs to it because DoRA
takes the norm of the weight once in each of its steps. The base weight is bf16, fp32 or NF4. Contenders take turns; a
ratio is the median over the rounds of DoRA / LoRA of the same library.

Before anything is timed, the output and all gradients of both DoRAs are compared with the equation in float64, the norm
held constant as in section 4.3 of the paper (arXiv 2402.09353); a contender that computes something else stops the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from contenders import ALPHA_OVER_R, Adapted, Case, Weights, draw, ours, theirs
from parity import TOLERANCE
from report import Cell, Claim, Report, command, run
from timing import interleaved, median_ratio
from torch import Tensor, nn

from lightning_lora import DoRAConfig
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import dense_weight

LAYER = "q_proj"
CASES = [Case(base) for base in ("bf16", "fp32", "nf4")]
LIMIT = 1.25


def measure(rounds: int) -> Report:
    """Time every case."""
    rows: list[list[Cell]] = []
    claims = []
    for case in CASES:
        seconds = time_case(case, rounds)
        ratios = {name: median_ratio(seconds[f"{name} DoRA"], seconds[f"{name} LoRA"]) for name in ("our", "PEFT's")}
        milliseconds = [1000 * statistics.median(values) for values in seconds.values()]
        rows.append([str(case), *milliseconds[:2], ratios["our"], *milliseconds[2:], ratios["PEFT's"]])
        claims.append(Claim(f"{case}: a DoRA step takes little more than our LoRA step", ratios["our"], LIMIT))
    return Report(
        title="One training step under DoRA and under LoRA (2048 -> 2048, r=16, 512 tokens)",
        command=command(__file__, rounds),
        columns=[
            "base",
            *("our LoRA, ms", "our DoRA, ms", "DoRA / LoRA"),
            *("PEFT's LoRA, ms", "PEFT's DoRA, ms", "DoRA / LoRA"),
        ],
        rows=rows,
        claims=claims,
        note="A step is forward, backward and one step of SGD over the adapter. Milliseconds are medians; a ratio is "
        "the median over the rounds of the two steps in the same round. Before timing, output and gradients of both "
        "DoRAs are compared with the equation in float64.",
    )


def time_case(case: Case, rounds: int) -> dict[str, list[float]]:
    """Build the contenders, hold both DoRAs to the equation, and time all in turns."""
    torch.manual_seed(0)
    weights = draw(case, (LAYER,))
    adapted = {
        "our LoRA": ours(case, weights)[LAYER],
        "our DoRA": ours(case, weights, DoRAConfig)[LAYER],
        "PEFT's LoRA": theirs(case, weights)[LAYER],
        "PEFT's DoRA": theirs(case, weights, use_dora=True)[LAYER],
    }
    host = adapted["our DoRA"].layer
    assert isinstance(host, AdaptedLayer)
    W = dense_weight(host.base_layer, torch.float32)
    x = torch.randn(case.tokens, case.width).to(case.dtype)
    grad = torch.randn(case.tokens, case.width).to(case.dtype)
    for name in ("our DoRA", "PEFT's DoRA"):
        check(case, name, adapted[name], weights[LAYER], W, x, grad)
    return interleaved({name: step(its.layer, x, grad) for name, its in adapted.items()}, rounds)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return one forward and backward pass, and an optimizer step too small to lead anywhere."""
    x = x.detach().requires_grad_()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-9)

    def train() -> None:
        x.grad = None
        optimizer.zero_grad()
        layer(x).backward(grad)
        optimizer.step()

    return train


def magnitude(adapted: Adapted) -> nn.Parameter:
    """The trained lengths ``m``."""
    layer: Any = adapted.layer
    if isinstance(layer, AdaptedLayer):
        return layer.adapter("default").get_parameter("lora_magnitude_vector")
    found: nn.Parameter = layer.lora_magnitude_vector["default"].weight
    return found


def check(case: Case, name: str, adapted: Adapted, weights: Weights, W: Tensor, x: Tensor, grad: Tensor) -> None:
    """Assert that output and all gradients are those of the equation."""
    m = magnitude(adapted)
    with torch.no_grad():
        m.mul_(torch.linspace(0.5, 1.5, m.numel()))
    leaves = [t.detach().double().requires_grad_() for t in (x, weights.A, weights.B, m)]
    V = W.double() + ALPHA_OVER_R * leaves[2] @ leaves[1]
    expected = leaves[0] @ (leaves[3].unsqueeze(1) * V / V.detach().norm(dim=1, keepdim=True)).T
    expected.backward(grad.double())
    x = x.detach().requires_grad_()
    y: Tensor = adapted.layer(x)
    y.backward(grad)
    found = {"output": y, "gradient of x": x.grad, "of A": adapted.A.grad, "of B": adapted.B.grad, "of m": m.grad}
    for (what, tensor), reference in zip(found.items(), [expected, *(leaf.grad for leaf in leaves)], strict=True):
        assert tensor is not None, f"{case}: no {what} of {name}"
        assert reference is not None
        error = float((tensor.detach().double() - reference.detach()).norm() / reference.detach().norm())
        limit = TOLERANCE[case.dtype]
        assert error <= limit, f"{case}: {what} of {name} is off by {error:.2e} of its norm, tolerance {limit:.2e}"


if __name__ == "__main__":
    run(__doc__, measure, repeats=40)
