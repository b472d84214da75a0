"""Time of a whole training step of a small transformer, beside PEFT's, in one process on the CPU.

The model has 4 layers of width 1024 (attention over 8 heads, gated MLP of 2816), in bf16, with adapters of rank 16 on
the seven linear layers of each; 512 tokens in one sequence. A step is forward pass, loss, backward pass and fused AdamW
over the adapters. Contenders take turns, and a ratio is the median over the rounds of theirs / ours.

  base   the frozen model with one trained vector added to its input, so that there is a backward pass: the floor
  ours   inject(model): adapters in fp32
  PEFT   get_peft_model(model): its default, adapters in fp32

Before anything is timed, loss and norm of the gradient of ours are compared with PEFT's on equal weights.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from report import Cell, Claim, Report, command, run
from timing import interleaved, median_ratio
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, inject

WIDTH, HIDDEN, HEADS, LAYERS, TOKENS, VOCABULARY, R = 1024, 2816, 8, 4, 512, 2048, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUTS = (0.0, 0.05)


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        z = self.attention_norm(x)
        q, k, v = (self.get_submodule(name)(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in TARGETS[:3])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.get_submodule("o_proj")(mixed)
        z = self.mlp_norm(x)
        y: Tensor = x + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))
        return y


class Transformer(nn.Module):
    """Tokens to the loss of predicting the next of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the loss; ``added`` is added to the embedded tokens."""
        x = self.embed(tokens)
        x = x if added is None else x + added
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def measure(rounds: int) -> Report:
    """Time every case."""
    rows: list[list[Cell]] = []
    claims = []
    for dropout in DROPOUTS:
        case = f"bf16, dropout {dropout:g}" if dropout else "bf16"
        seconds = time_case(dropout, rounds)
        milliseconds = [1000 * statistics.median(values) for values in seconds.values()]
        theirs, floor = (median_ratio(seconds["PEFT"], seconds[name]) for name in ("ours", "base"))
        rows.append([case, *milliseconds, theirs, floor])
        claims.append(Claim(f"{case}: a step takes no longer than with PEFT's default, ours / PEFT", 1 / theirs, 1.0))
    return Report(
        title="A whole training step of a transformer (4 layers of 1024, r=16 on 28 linear layers, 512 tokens)",
        command=command(__file__, rounds),
        columns=["base", "base, ms", "ours, ms", "PEFT, ms", "PEFT / ours", "PEFT / base"],
        rows=rows,
        claims=claims,
        note="A step is forward pass, loss, backward pass and fused AdamW. *base* is the frozen model without adapters "
        "and optimizer, so *PEFT / base* is the most that *PEFT / ours* could be. Before timing, loss and norm of the "
        "gradient are compared between the two.",
    )


def time_case(dropout: float, rounds: int) -> dict[str, list[float]]:
    """Build the contenders on equal weights, compare them, and time them in turns."""
    torch.manual_seed(0)
    model = Transformer().bfloat16().requires_grad_(False)
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    ours = inject(copy.deepcopy(model), TARGETS, LoRAConfig(r=R, alpha=2 * R, dropout=dropout)).train()
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=TARGETS)
    copied: Any = copy.deepcopy(model)
    theirs = peft.get_peft_model(copied, config).train()
    compare(ours, theirs, tokens)
    added = nn.Parameter(torch.zeros(WIDTH, dtype=torch.bfloat16))

    def frozen() -> None:
        added.grad = None
        model(tokens, added).backward()

    return interleaved({"base": frozen, "ours": step(ours, tokens), "PEFT": step(theirs, tokens)}, rounds)


def compare(ours: nn.Module, theirs: nn.Module, tokens: Tensor) -> None:
    """Give both the same adapters, and assert that loss and norm of the gradient agree where nothing drops out."""
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    assert [p.shape for p in trained[0]] == [p.shape for p in trained[1]]
    found = []
    with torch.no_grad():
        for mine, peer in zip(*trained, strict=True):
            nn.init.normal_(mine, std=1 / math.sqrt(WIDTH))
            peer.copy_(mine)
    for model, parameters in zip((ours, theirs), trained, strict=True):
        model.eval()
        loss = model(tokens)
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
        found.append((loss.item(), norm.item()))
        for parameter in parameters:
            parameter.grad = None
        model.train()
    for mine, peer in zip(*found, strict=True):  # a few hundred roundings of 2^-8 in each, which mostly cancel
        assert abs(mine / peer - 1) <= 2**-5, found


def step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Return one step of training, too small to lead anywhere."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)

    def train() -> None:
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()

    return train


if __name__ == "__main__":
    run(__doc__, measure, repeats=20)
