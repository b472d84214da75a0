"""How much of the forward pass a checkpointed block computes again, ours beside PEFT's, counted and not timed.

The block is a gated MLP (1024 -> 2816 -> 1024) on 128 tokens with adapters of rank 16 on its three layers, under
``torch.utils.checkpoint`` (``use_reentrant=False``), which stops recomputing as soon as it has what the backward pass
asks for. Counted are the floating-point operations of products (``torch.utils.flop_counter``): those of forward and
backward pass with checkpointing, less those without, over those of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from report import Claim, Report, command, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, inject, quantize

WIDTH, HIDDEN, TOKENS, R = 1024, 2816, 128, 16
TARGETS = ["gate_proj", "up_proj", "down_proj"]
DROPOUTS = (0.0, 0.05)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def measure(repeats: int) -> Report:
    """Count for every contender; counting is exact, so each further repeat only has to agree."""
    rows, claims = [], []
    for dropout in DROPOUTS:
        contenders = {"ours, bf16": ours(dropout), "ours, NF4": quantize(ours(dropout)), "PEFT, bf16": theirs(dropout)}
        for name, model in contenders.items():
            shares = {share(model) for _ in range(repeats)}
            assert len(shares) == 1
            case = f"{name}, dropout {dropout:g}" if dropout else name
            rows.append([case, *shares])
            if name.startswith("ours"):
                claims.append(Claim(f"{case}: recomputed, of the forward pass", *shares, 0.75))
    return Report(
        title="What a checkpointed block computes again (gated MLP, 1024 -> 2816 -> 1024, r=16, 128 tokens)",
        command=command(__file__, repeats),
        columns=["block", "recomputed / forward pass"],
        rows=rows,
        claims=claims,
        note="Floating-point operations of products. *PEFT* is its default (adapters in fp32).",
    )


def ours(dropout: float) -> nn.Module:
    """The block with this library's adapters."""
    return inject(GatedMLP().bfloat16(), TARGETS, LoRAConfig(r=R, dropout=dropout)).train()


def theirs(dropout: float) -> nn.Module:
    """The block with PEFT's."""
    config = peft.LoraConfig(r=R, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS)
    block: Any = GatedMLP().bfloat16()
    return peft.get_peft_model(block, config).train()


def share(model: nn.Module) -> float:
    """Return what is computed again, over the forward pass."""
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    forward = flops(lambda: model(x))
    plain = flops(lambda: model(x).sum().backward())
    saving = flops(lambda: checkpoint(model, x, use_reentrant=False).sum().backward())  # type: ignore[union-attr]
    return (saving - plain) / forward


def flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of the products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


if __name__ == "__main__":
    run(__doc__, measure, repeats=1)
