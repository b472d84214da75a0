"""Our estimates beside the table that is quoted most for the memory of fine-tuning, LLaMA-Factory's rule of thumb.

Analytic, from configs alone: models are made on the meta device, one training step of each is made without values
(bf16-true, batch 1, activation checkpointing, rank 16, GaLore of rank 128). The table's own figures are estimates too,
and do not say for which sequence, batch or rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from report import Cell, Claim, Report, command, run
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from lightning_lora import GaLore
from lightning_lora.cli.estimating import _language_batch
from lightning_lora.estimation.estimate import estimate
from lightning_lora.estimation.rules import TABLE
from lightning_lora.estimation.setup import BLOCKS, Setup

LENGTHS = (512, 2048)
GB = 10**9
BLOCKS_MADE = (3, 5)
"""Of so many blocks estimates are made; more than the two that ``freeze`` trains."""
EXPERTS = ("all-linear", "*.experts.gate_up_proj", "*.experts.down_proj")
"""Stacked experts are adapted, and so stored in few bits, where they are named."""


def llama(width: int, inner: int, layers: int, heads: int, key_value_heads: int | None = None) -> LlamaConfig:
    """Return the config of a Llama with a vocabulary of 32,000."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads, vocab_size=32000,
    )  # fmt: skip


def mixtral(width: int, inner: int, layers: int, heads: int) -> MixtralConfig:
    """Return the config of a Mixtral with eight experts, two of which see each token."""
    return MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip


MODELS: dict[str, Callable[[], LlamaConfig | MixtralConfig]] = {
    "7B": lambda: llama(4096, 11008, 32, 32),
    "13B": lambda: llama(5120, 13824, 40, 40),
    "30B": lambda: llama(6656, 17920, 60, 52),
    "70B": lambda: llama(8192, 28672, 80, 64, 8),
    "8x7B": lambda: mixtral(4096, 14336, 32, 32),
    "8x22B": lambda: mixtral(6144, 16384, 56, 48),
}


def setup_of(method: str, model: str) -> Setup:
    """Return the setup of a cell."""
    common = Setup(method="full", activation_checkpointing=BLOCKS)
    if method == "galore":
        return replace(common, optimizer=GaLore(rank=128))
    targets = EXPERTS if "x" in model and "lora" in method else "all-linear"
    return replace(common, method=method, targets=targets)


def measure(repeats: int) -> Report:
    """Estimate every cell of the table; there is nothing to repeat."""
    rows: list[list[Cell]] = []
    for name in MODELS:
        rows += [[name, method, *told(name, setup_of(method, name), TABLE[method][name])] for method in TABLE]
    above = [row for row in rows if row[1] in ("qlora-8bit", "qlora-4bit") and "above" in row]
    ratio = whole("7B", setup_of("qlora-4bit", "7B")) / extended("7B", setup_of("qlora-4bit", "7B"), LENGTHS[0])
    return Report(
        title="estimate(model, batch) beside LLaMA-Factory's rule of thumb, in GB (10^9 bytes)",
        command=command(__file__, repeats),
        columns=["model", "method", "ours, 512 tokens", "ours, 2048 tokens", "rule of thumb", "512", "2048"],
        rows=rows,
        claims=[
            Claim("cells of qlora-8bit and qlora-4bit, of 24, that lie above the rule", len(above), 0),
            Claim("7B in 4 bits with all its blocks at once / from its first blocks", ratio, 1.05),
        ],
        note=NOTE,
    )


def told(name: str, setup: Setup, rule: int) -> list[Cell]:
    """Return our figure for each length, the rule's, and on which side of it ours lie."""
    sizes = [extended(name, setup, length) / GB for length in LENGTHS]
    return [*sizes, float(rule), *("below" if size < rule else "above" for size in sizes)]


def extended(name: str, setup: Setup, length: int) -> float:
    """Return the bytes of the whole model, from those of its first blocks: each further one adds the same.

    That leaves out where the peak moves from the backward pass to the optimizer's update as models deepen.
    """
    few, more = (estimate(built(name, n), _language_batch(1, length), setup).total for n in BLOCKS_MADE)
    rest = MODELS[name]().num_hidden_layers - BLOCKS_MADE[1]
    return more + rest * (more - few) / (BLOCKS_MADE[1] - BLOCKS_MADE[0])


def whole(name: str, setup: Setup) -> int:
    """Return the bytes of the whole model at the shorter length."""
    return estimate(built(name, MODELS[name]().num_hidden_layers), _language_batch(1, LENGTHS[0]), setup).total


@cache
def built(name: str, layers: int) -> nn.Module:
    """Return the first blocks of a model, on the meta device."""
    config = MODELS[name]()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    assert isinstance(made, nn.Module)
    return made


NOTE = (
    "Both are estimates; the rule of thumb says neither sequence nor batch. Ours: tensors at the peak of a step, all "
    "of them on the device (paged moments too), without the CUDA context. The weights of 30B alone are 65 GB in 16 "
    "bits, those of 7B 13.5. *galore* holds the gradients of all weights, as its authors' layer-by-layer updates do "
    "not, and projects no stacks; *badam* trains a block at a time. While a block of stacked experts (8x7B, 8x22B) "
    "computes, all of them stand there in 16 bits."
)

if __name__ == "__main__":
    run(__doc__, measure, repeats=1)
