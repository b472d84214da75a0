"""Time of one optimizer step over the adapters of 224 layers, in one process.

Layers have the shapes of Llama-2-7B's, narrower by a factor: rank 16 on all 224 linear layers makes 448 tensors.
Gradients are given, so that nothing but the step is timed. Contenders take turns, and a ratio is the median over the
rounds of ours / theirs: below 1 we are faster.

  ours          the paged 8-bit AdamW of LoRACallback: one update for the group
  bitsandbytes  bitsandbytes.optim.PagedAdamW8bit: an update, and on CUDA a wait, for each tensor
  torch fused   torch.optim.AdamW(fused=True), moments in 32 bits: what optimizer=None leaves to the user
  update alone  bitsandbytes' update of one buffer that holds all parameters, as if nothing had to be gathered

Before anything is timed, the parameters after three steps of ours and of bitsandbytes' are compared bit for
bit. On a CPU the clock is that of the process, which stands while others have the processor: pass OMP_NUM_THREADS=1 in
the environment, so that it counts one thread.

With --device cuda the layers have their full width, and the figures are worth writing down.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from report import Cell, Claim, Report, command, environment, parser
from timing import interleaved, median_ratio
from torch import nn

from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.moments import Moments8bit

WIDTH, INNER, RANK, BLOCKS = 4096, 11008, 16, 32
NARROWER = {"cpu": (32, 16, 4), "cuda": (16, 1)}
"""By what the widths of the model are divided. On a CPU from 4 on, tensors are updated one by one by both."""

SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}


def shapes(narrower: int) -> list[tuple[int, int]]:
    """Shapes of ``A`` and ``B`` of every linear layer."""
    d, inner = WIDTH // narrower, INNER // narrower
    sizes = [(d, d)] * 4 + [(d, inner)] * 2 + [(inner, d)]
    return [shape for _ in range(BLOCKS) for i, o in sizes for shape in ((RANK, i), (o, RANK))]


def measure(rounds: int, device: str) -> Report:
    """Time every width."""
    rows: list[list[Cell]] = []
    claims = []
    for narrower in NARROWER[device]:
        parameters = drawn(narrower, device)
        clock = time.perf_counter if device == "cuda" else time.process_time
        seconds = interleaved(contenders(parameters), rounds, clock)
        elements = sum(p.numel() for p in parameters)
        rows.append(row(f"{WIDTH // narrower} ({elements / 1e6:.1f}M)", seconds))
        ratio = median_ratio(seconds["ours"], seconds["bitsandbytes"])
        # on a CPU both make the very same calls at the largest width, and the ratio is 1 within the noise
        limit = 0.05 if device == "cuda" else 1.02
        claims.append(Claim(f"d={WIDTH // narrower}: a step, ours / bitsandbytes' tensor by tensor", ratio, limit))
    return Report(
        title=f"One optimizer step over the adapters of 224 layers (r=16, 448 tensors), {device}",
        command=command(__file__, rounds) + f" --device {device}",
        columns=["d (parameters)", "ours, ms"]
        + [f"{name}, {kind}" for name in PEERS for kind in ("ms", "ours / this")],
        rows=rows,
        claims=claims,
        note=NOTE,
    )


NOTE = (
    "A ratio is the median over the rounds of ours / theirs in the same round. *bitsandbytes* is `PagedAdamW8bit`, "
    "tensor by tensor; before timing, parameters after three steps are compared with it bit for bit. *torch fused* is "
    "`AdamW(fused=True)`, with moments in 32 bits. *update alone* is bitsandbytes' update of one buffer of all "
    "parameters in 8 bits, as if nothing had to be gathered. d is the width of the model; at 128 most tensors have "
    "less than 4096 elements, and so moments in 32 bits with both."
)

PEERS = ("bitsandbytes", "torch fused", "update alone")


def row(name: str, seconds: dict[str, list[float]]) -> list[Cell]:
    """One line of the table."""
    cells: list[Cell] = [name, 1000 * statistics.median(seconds["ours"])]
    for peer in PEERS:
        cells += [1000 * statistics.median(seconds[peer]), median_ratio(seconds["ours"], seconds[peer])]
    return cells


def drawn(narrower: int, device: str) -> list[nn.Parameter]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes(narrower)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def contenders(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Each over parameters of its own, once ours is held to the numbers of bitsandbytes."""
    made = {
        "ours": partial(FlatPagedAdamW8bit, **SETTINGS),
        "bitsandbytes": partial(one_by_one, **SETTINGS),
        "torch fused": partial(torch.optim.AdamW, **SETTINGS, fused=True),
    }
    held = {name: twins(parameters) for name in made}
    steps = {name: make(held[name]).step for name, make in made.items()}
    for _ in range(3):
        steps["ours"]()
        steps["bitsandbytes"]()
    if not all(torch.equal(a, b) for a, b in zip(held["ours"], held["bitsandbytes"], strict=True)):
        raise SystemExit("ours and bitsandbytes' give different parameters: no timing")
    steps["update alone"] = update_alone(parameters)
    return {name: partial(finished, step, parameters[0].device) for name, step in steps.items()}


def one_by_one(parameters: list[nn.Parameter], **settings: float) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer, without its warning that a CPU pages nothing."""
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)
    optimizer._cpu_paged_warned = True  # type: ignore[attr-defined]
    return optimizer


def update_alone(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """One update of all elements, where they are one buffer already."""
    weight = torch.cat([p.detach().flatten() for p in parameters])
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    moments = Moments8bit(weight.numel(), weight.device)
    group = {**SETTINGS, "betas": (0.9, 0.999), "eps": 1e-8}
    part = moments.part(0, weight.numel())
    return lambda: moments.update(weight, gradient, part, 1, group)


def twins(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Copies with the same gradients."""
    copies = copy.deepcopy(parameters)
    for ours, theirs in zip(parameters, copies, strict=True):
        theirs.grad = ours.grad
    return copies


def finished(step: Callable[[], object], device: torch.device) -> None:
    """Step, and wait until the GPU has done it."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Read the command line, measure, print and write."""
    arguments = parser(__doc__, repeats=15)
    arguments.add_argument("--device", choices=tuple(NARROWER), default="cpu")
    arguments.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table here")
    given = arguments.parse_args()
    report = measure(given.repeats, given.device)
    print(report.text())
    if given.markdown is not None:
        given.markdown.write_text(report.markdown())
    if given.json is not None:
        where = environment() | ({"GPU": torch.cuda.get_device_name()} if given.device == "cuda" else {})
        given.json.write_text(json.dumps({"environment": where, **report.to_json()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
