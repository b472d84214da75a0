"""What a storage loses of a weight before it is tried on one: its error on Gaussian weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from lightning_lora.nn.loftq import norm
from lightning_lora.quantization.config import NF4Config, QuantizationConfig
from lightning_lora.quantization.formats import quantized_linear

_SIZE = 512  # of 2^18 draws the second digit of the error is stable, and a block of any size is there many times


@lru_cache(maxsize=32)
def expected_error(config: QuantizationConfig) -> float:
    """Return ``||W - deq(Q)|| / ||W||`` for independent Gaussian ``W``, the same number each time."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(_SIZE, _SIZE, bias=False, device="meta")
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.randn(_SIZE, _SIZE, generator=draw)
        found = quantized_linear(layer, config, weight=weight).dequantize(torch.float32)
    return norm(weight - found) / norm(weight)


def lossy(config: QuantizationConfig) -> str:
    """Say what a storage is expected to lose, for a warning: beside NF4, which everybody trains over."""
    return (
        f"quantization={config.name!r} loses {expected_error(config):.0%} of Gaussian weights (relative error; NF4 "
        f"{expected_error(NF4Config()):.0%})"
    )
