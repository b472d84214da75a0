"""The demo's byte-level language model: a small causal transformer and the LightningModule that trains it.

Nothing here knows of LoRA. It is the kind of module a user brings: plain ``nn.Linear`` layers, ``configure_optimizers``
with ``AdamW`` and a schedule. Read it next to ``run.py`` to see that one callback is all that changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ByteLMConfig:
    """Sizes of a :class:`ByteLM`; the defaults are the shipped base model's (0.69 M parameters)."""

    width: int = 128
    depth: int = 3
    heads: int = 4
    context: int = 256
    vocab: int = 256


class Attention(nn.Module):
    """Causal self-attention with separate query, key, value and output projections."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to ``(batch, time, width)``."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return y


class Block(nn.Module):
    """Pre-norm transformer block: attention and a four times wider GELU network, each added to its input."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up_proj = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to ``(batch, time, width)``."""
        x = x + self.attn(self.attn_norm(x))
        y: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x))))
        return y


class ByteLM(nn.Module):
    """Next-byte model: ``(batch, time)`` byte values to ``(batch, time, 256)`` logits."""

    def __init__(self, config: ByteLMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ByteLMConfig()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the byte that follows each position."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, *, temperature: float = 0.7, seed: int = 0) -> bytes:
        """Sample ``length`` bytes after ``prompt``; the same seed gives the same bytes."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([list(prompt)])
        for _ in range(length):
            logits = self(tokens[:, -self.config.context :])[0, -1].float()
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)
            tokens = torch.cat([tokens, following[None]], dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())


class LanguageModel(LightningModule):
    """Trains any ``tokens -> logits`` network on next-token cross-entropy with AdamW, a short warm-up and a cosine.

    Args:
        network: Maps ``(batch, time)`` integers to ``(batch, time, vocab)`` logits.
        lr: Highest learning rate.
    """

    def __init__(self, network: nn.Module, *, lr: float) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the network's logits, also from the output object of a Hugging Face model."""
        output = self.network(tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Mean loss of a ``(batch, time + 1)`` window in nats; the progress bar shows it in bits."""
        loss = self.nats(batch[0])
        self.log("bits/byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the held-out bits per byte, averaged over the epoch."""
        self.log("held-out bits/byte", self.nats(batch[0]) / math.log(2), prog_bar=True, batch_size=batch[0].shape[0])

    def nats(self, window: Tensor) -> Tensor:
        """Mean next-token cross-entropy over a ``(batch, time + 1)`` window."""
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: the callback is what narrows it to the adapters."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
