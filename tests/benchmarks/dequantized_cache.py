"""Time of a training step over a quantized base whose weights are kept dequantized, beside one that keeps none.

One adapted linear layer of 2048 -> 2048 with rank 16 in bf16, forward and backward pass, over NF4, INT8 and NF2. What
is kept is the weight in bf16: 8 MiB. Contenders take turns, and a ratio is the median over the rounds; results are
compared bit by bit before.
"""

from __future__ import annotations

import statistics
import warnings

import torch
from linear_step import step
from report import Cell, Claim, Report, command, run
from timing import interleaved, median_ratio
from torch import nn

from lightning_lora import Int8Config, LoRAConfig, NF2Config, NF4Config, inject, quantize
from lightning_lora.model.dequantized import keep_dequantized
from lightning_lora.quantization.config import QuantizationConfig

WIDTH, R = 2048, 16
STORAGES: tuple[QuantizationConfig, ...] = (NF4Config(), Int8Config(), NF2Config())
TOKENS = (16, 512)


def measure(rounds: int) -> Report:
    """Time every storage and number of tokens."""
    rows: list[list[Cell]] = []
    claims = []
    for config in STORAGES:
        for tokens in TOKENS:
            seconds = time_case(config, tokens, rounds)
            ratio = median_ratio(seconds["dequantized"], seconds["kept"])
            rows.append(
                [f"{config.name}, {tokens} tokens", *(1000 * statistics.median(s) for s in seconds.values()), ratio]
            )
            claims.append(Claim(f"{config.name}, {tokens} tokens: no slower, kept / dequantized", 1 / ratio, 1.0))
    return Report(
        title="A step over weights that stay dequantized (2048 -> 2048, r=16, bf16)",
        command=command(__file__, rounds),
        columns=["layer", "dequantized, ms", "kept, ms", "dequantized / kept"],
        rows=rows,
        claims=claims,
        note="*dequantized* dequantizes for each of the two products with the base weight, *kept* does so once.",
    )


def time_case(config: QuantizationConfig, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Build the layer twice and time a step over each in turns."""
    contenders = {}
    outputs = []
    torch.manual_seed(0)
    x, grad = (torch.randn(tokens, WIDTH).bfloat16() for _ in range(2))
    for name in ("dequantized", "kept"):
        layer = adapted(config)
        if name == "kept":
            keep_dequantized(layer, 2 * WIDTH * WIDTH)
        outputs.append(layer(x))
        contenders[name] = step(layer, x, grad)
    assert torch.equal(*outputs)
    return interleaved(contenders, rounds)


def adapted(config: QuantizationConfig) -> nn.Module:
    """One adapted layer over a quantized base, the same each time."""
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).bfloat16(), "0", LoRAConfig(r=R))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return quantize(model, config).train().get_submodule("0")


if __name__ == "__main__":
    run(__doc__, measure, repeats=30)
