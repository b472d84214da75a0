"""estimate(model, batch) beside the peak of what PyTorch allocates in a real run of the same, on the CPU.

Measured is what the CPU allocator gives out in two steps of training (forward pass, backward pass, optimizer, in
Lightning's order), as torch.profiler reports it, and the bytes of model and batch before them. Estimated is from
shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import Cell, Claim, Report, command, run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    ViTConfig,
)

from lightning_lora import LoRAConfig, inject, quantize
from lightning_lora.estimation.estimate import estimate
from lightning_lora.estimation.replay import default_step, recompute
from lightning_lora.estimation.setup import Setup
from lightning_lora.model.blocks import repeated_blocks
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit

sys.path.insert(0, str(Path(__file__).parent.parent / "estimation"))
from allocations import peak_allocations

METHODS = ("full", "freeze", "lora", "qlora-4bit")
MIB = 2**20


def tokens(vocabulary: int, batch: int, length: int) -> dict[str, Any]:
    """Return a batch of a language model."""
    ids = torch.randint(vocabulary, (batch, length))
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def llama() -> tuple[nn.Module, Any]:
    """Gated MLP, rotary positions, RMSNorm."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, vocab_size=4000
    )
    return AutoModelForCausalLM.from_config(config), tokens(4000, 4, 128)


def qwen() -> tuple[nn.Module, Any]:
    """Few key and value heads, biases, and a head tied to the embedding."""
    config = Qwen2Config(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=8000, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokens(8000, 2, 256)


def gpt2() -> tuple[nn.Module, Any]:
    """LayerNorm, GELU and transposed linear layers."""
    config = GPT2Config(
        n_embd=512, n_layer=6, n_head=8, vocab_size=4000, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return AutoModelForCausalLM.from_config(config), tokens(4000, 4, 128)


def bert() -> tuple[nn.Module, Any]:
    """An encoder that classifies."""
    config = BertConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, vocab_size=4000,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    batch = {"input_ids": torch.randint(4000, (8, 64)), "labels": torch.randint(2, (8,))}
    return AutoModelForSequenceClassification.from_config(config), batch


def vit() -> tuple[nn.Module, Any]:
    """Pictures."""
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=112,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(8, 3, 112, 112), "labels": torch.randint(2, (8,))}
    return AutoModelForImageClassification.from_config(config), batch


class Perceptron(nn.Module):
    """No transformer: wide linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.GELU())]
        self.body = nn.Sequential(*layers)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(1024, 10)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss."""
        x, y = batch
        x = self.body(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), y)


def perceptron() -> tuple[nn.Module, Any]:
    """A module of one's own."""
    return Perceptron(), (torch.randn(512, 1024), torch.randint(10, (512,)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "Llama": llama, "Qwen2": qwen, "GPT-2": gpt2, "BERT": bert, "ViT": vit, "MLP": perceptron
}  # fmt: skip


def measure(repeats: int) -> Report:
    """Estimate and measure every model and method; both are deterministic, so each repeat has to agree."""
    rows: list[list[Cell]] = []
    ratios = []
    for name, make in MODELS.items():
        for method in METHODS if name != "GPT-2" else METHODS[:3]:  # NF4 holds no Conv1D
            for checkpointing in (None, "blocks"):
                setup = Setup(method=method, precision=PRECISION, device="cpu", activation_checkpointing=checkpointing)
                found = {both(make, setup) for _ in range(repeats)}
                estimated, measured = max(found)
                ratios.append(estimated / measured)
                what = f"{method}, checkpointing" if checkpointing else method
                rows.append([name, what, estimated / MIB, measured / MIB, estimated / measured])
    claims = [
        Claim("the highest estimate / measured", max(ratios), 1.10),
        Claim("the highest measured / estimate", 1 / min(ratios), 1.10),
    ]
    return Report(
        title=f"estimate(model, batch) and the measured peak of {len(MODELS)} models ({PRECISION})",
        command=command(__file__, repeats),
        columns=["model", "method", "estimated, MiB", "measured, MiB", "estimated / measured"],
        rows=rows,
        claims=claims,
        note="Peak of all tensors in a training step. *measured*: bytes of model and batch, and what PyTorch's CPU "
        "allocator gave out in two steps.",
    )


PRECISION = "32-true"


def both(make: Callable[[], tuple[nn.Module, Any]], setup: Setup) -> tuple[int, int]:
    """Return the estimate and the measured peak, in bytes."""
    torch.manual_seed(0)
    model, batch = make()
    estimated = estimate(model, batch, setup).total
    return estimated, real_peak(model.to(setup.dtype), batch, setup)


def real_peak(model: nn.Module, batch: Any, setup: Setup) -> int:
    """Train ``model`` for two steps, and return its bytes and the most that was allocated beyond them."""
    prepare(model.train(), setup)
    recompute(model, setup.activation_checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers(), *leaves]]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    optimizer = FlatPagedAdamW8bit(trained)

    def train() -> None:
        for _ in range(2):
            loss = default_step(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return sum(held.values()) + peak_allocations(train)


def prepare(model: nn.Module, setup: Setup) -> None:
    """Make ``model`` what is trained."""
    if setup.method == "freeze":
        model.requires_grad_(False)
        for block in list(repeated_blocks(model).values())[-2:]:
            block.requires_grad_(True)
    if "lora" in setup.method:
        inject(model, setup.targets, LoRAConfig(r=setup.r)).to(setup.dtype)
    if "qlora" in setup.method:
        quantize(model)


if __name__ == "__main__":
    run(__doc__, measure, repeats=1)
