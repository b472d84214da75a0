"""Time of one training step of ONE adapted linear layer, beside PEFT's, in one process on the CPU.

A step is the forward and the backward pass of a layer of 2048 -> 2048 features with rank 16 on 512 or 2048 tokens whose
gradient is wanted too, as inside a network. The base weight is bf16, fp32 or NF4; the adapter drops out nothing or 5%.
Contenders take turns, and a ratio is the median over the rounds of theirs / ours: above 1 we are faster.

  base       the frozen layer alone, NF4 ours: the floor that no adapter can pass. PEFT / base is therefore the most
             that PEFT / ours could be on this machine
  products   the same, and then the six products of rank 16 by themselves, each in the layout that is fastest here, with
             no graph and no dropout around them: the floor for who multiplies with torch's products
  ours       inject(model), and quantize(model) for NF4; master weights in fp32
  PEFT       get_peft_model(model): its default, adapters in fp32
  PEFT bf16  the same with autocast_adapter_dtype=False: adapters in bf16, which then are the master weights

On a machine that is not yours alone, pass OMP_NUM_THREADS=1 in the environment: with more threads, each operation waits
for the one that another process has put off, and small operations cost far more than they should.

Before anything is timed, the output, the loss and the gradients of x, A and B of each contender are compared with the
equation in float64; a contender that computes something else stops the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from contenders import ALPHA_OVER_R, Adapted, Case, Weights, draw, ours, theirs
from parity import check
from products import six_products
from report import Cell, Claim, Report, command, run
from timing import interleaved, median_ratio
from torch import Tensor, nn

from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import dense_weight

LAYER = "q_proj"
PEERS = ("ours", "PEFT", "PEFT bf16")
CASES = [
    Case(base, dropout, tokens=tokens)
    for tokens in (512, 2048)
    for base in ("bf16", "fp32", "nf4")
    for dropout in (0.0, 0.05)
]
HALF = ("bf16", "nf4")
"""Where something is claimed. Over fp32 both compute the same products, and the ratio is 1 within the noise."""


def measure(rounds: int) -> Report:
    """Time every case."""
    rows: list[list[Cell]] = []
    claims = []
    for case in CASES:
        seconds = time_case(case, rounds)
        rows.append(row(case, seconds))
        if case.base in HALF:
            ratio = median_ratio(seconds["ours"], seconds["PEFT"])
            claims.append(Claim(f"{case}: a step takes no longer than with PEFT's default, ours / PEFT", ratio, 1.0))
    return Report(
        title="One training step of one adapted linear layer (2048 -> 2048, r=16)",
        command=command(__file__, rounds),
        columns=[
            "layer",
            *(f"{name}, ms" for name in ("base", *PEERS)),
            *(f"{name} / ours" for name in PEERS[1:]),
            "PEFT / base",
            "PEFT / products",
        ],
        rows=rows,
        claims=claims,
        note="Milliseconds are medians; a ratio is the median over the rounds of theirs / ours in the same round, "
        "which holds where the clock of the machine changes between rounds. *base* is the frozen layer alone, so "
        "*PEFT / base* is what *PEFT / ours* would be if our adapter cost nothing: the most that is possible here. It "
        "depends on how fast the machine's half-precision products are beside its other operations. *products* is the "
        "same step and then the six products of rank 16 by themselves, each in the layout that is fastest here, with "
        "no graph and no dropout around them: *PEFT / products* is the most that is possible with torch's products. "
        "*PEFT* is its default (adapters in fp32), *PEFT bf16* with `autocast_adapter_dtype=False`. Before timing, "
        "output, loss and gradients of each contender are compared with the equation in float64.",
    )


def row(case: Case, seconds: dict[str, list[float]]) -> list[Cell]:
    """One line of the table."""
    milliseconds = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median_ratio(seconds[name], seconds["ours"]) for name in seconds}
    return [
        str(case),
        *(milliseconds.get(name, "-") for name in ("base", *PEERS)),
        *(ratios.get(name, "-") for name in PEERS[1:]),
        *(median_ratio(seconds["PEFT"], seconds[floor]) for floor in ("base", "products")),
    ]


def time_case(case: Case, rounds: int) -> dict[str, list[float]]:
    """Build the contenders, hold each to the equation, and time them in turns."""
    torch.manual_seed(0)
    weights = draw(case, (LAYER,))
    adapted = {"ours": ours(case, weights)[LAYER], "PEFT": theirs(case, weights)[LAYER]}
    if case.dtype != torch.float32:
        adapted["PEFT bf16"] = theirs(case, weights, autocast_adapter_dtype=False)[LAYER]
    base, W = frozen(adapted["ours"], case.dtype)
    x = torch.randn(case.tokens, case.width).to(case.dtype)
    grad = aligned_gradient(weights[LAYER], W, x)
    for name, contender in adapted.items():
        check(case, name, contender, weights[LAYER], W, x, grad)
    alone = step(base, x, grad)
    products = six_products(weights[LAYER].A.to(x.dtype), weights[LAYER].B.to(x.dtype), x, grad)
    steps = {"base": alone, "products": lambda: (alone(), products())}
    return interleaved(steps | {name: step(its.layer, x, grad) for name, its in adapted.items()}, rounds)


def frozen(adapted: Adapted, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Return the layer under our adapter and the weight that it multiplies with."""
    assert isinstance(adapted.layer, AdaptedLayer)
    return adapted.layer.base_layer, dense_weight(adapted.layer.base_layer, dtype)


def aligned_gradient(weights: Weights, W: Tensor, x: Tensor) -> Tensor:
    """A gradient that points along the output, so that the loss ``<y, grad>`` is a sum without cancellation."""
    adapter = ALPHA_OVER_R * (x.float() @ weights.A.T) @ weights.B.T
    return (x.float() @ W.float().T + adapter).to(x.dtype)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return one forward and backward pass; gradients start at None, as after ``optimizer.zero_grad()``."""
    x = x.detach().requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward_backward() -> None:
        for tensor in trained:
            tensor.grad = None
        layer(x).backward(grad)

    return forward_backward


if __name__ == "__main__":
    run(__doc__, measure, repeats=60)
