"""NormalFloat of two and three bits in plain torch: levels from quantiles of a Gaussian, as those of NF4 are.

With ``b`` bits and ``n = 2^b`` levels, of which ``n / 2`` are positive, ``n / 2 - 1`` negative and one is zero,

    o = 1 - (1 / (2 n) + 1 / (2 n - 2)) / 2
    positive = ndtri(o + (1/2 - o) i / (n/2)),       i = 0, ..., n/2 - 1
    negative = -ndtri(o + (1/2 - o) i / (n/2 - 1)),  i = 0, ..., n/2 - 2

where ``ndtri(p) = sqrt(2) erfinv(2 p - 1)``; all are divided by the largest, ``ndtri(o)``. For ``b = 4`` these are the
sixteen levels of QLoRA (arXiv 2305.14314, section 3). Two bits have ``-1, 0, 0.4358, 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.kernels import bits as packing
from lightning_lora.kernels.maxima import block_maxima
from lightning_lora.kernels.packed import Packed


@lru_cache(maxsize=4)
def levels(bits: int) -> tuple[float, ...]:
    """The ``2^b`` levels, rising from -1 to 1; computed in ``float64``."""
    half = 2 ** (bits - 1)
    o = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    positive, negative = (_quantiles(o, count) for count in (half, half - 1))  # each from 1 downwards
    return tuple(torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]).tolist())


def quantize(flat: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return packed codes of the nearest levels, and the absolute maximum of each block in ``float32``.

    Args:
        flat: Weights of shape ``(N,)``.
        bits: 2 or 3.
        block_size: Weights that share a maximum.
    """
    count = flat.numel()
    blocks = F.pad(flat.float(), (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    rising = table(bits, flat.device)
    codes = torch.bucketize(scaled.view(-1)[:count], (rising[1:] + rising[:-1]) / 2, out_int32=True)
    return packing.pack(codes, bits), absmax


def dequantize(packed: Packed, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight: each product of level and maximum is ``float32`` and rounded to ``dtype`` once."""
    count = math.prod(shape)
    weight = _items(bits, packed.codes.device).index_select(0, packing.items(packed.codes, bits)).view(-1)
    blocks = F.pad(weight, (0, packed.absmax.numel() * packed.block_size - weight.numel()))
    blocks.view(-1, packed.block_size).mul_(block_maxima(packed)[:, None])
    weight = blocks[:count].view(*shape).to(dtype)
    return weight.clone() if weight.untyped_storage().nbytes() > count * dtype.itemsize else weight


@lru_cache(maxsize=16)
def table(bits: int, device: torch.device) -> Tensor:
    """The levels in ``float32``."""
    with torch.inference_mode(False):  # kept for all later calls, also those that record gradients
        return torch.tensor(levels(bits), dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _items(bits: int, device: torch.device) -> Tensor:
    """What each item of four codes stands for, of shape ``(2^(4 b), 4)``: one look-up gives four weights."""
    with torch.inference_mode(False):  # kept for all later calls, also those that record gradients
        item = torch.arange(2 ** (packing.PER_ITEM * bits), device=device)
        shifts = bits * torch.arange(packing.PER_ITEM, device=device)
        return table(bits, device)[(item[:, None] >> shifts) & (2**bits - 1)]


def _quantiles(o: float, count: int) -> Tensor:
    probabilities = torch.linspace(o, 0.5, count + 1, dtype=torch.float64)[:-1]
    quantiles: Tensor = torch.special.ndtri(probabilities)
    return quantiles / quantiles[0]
