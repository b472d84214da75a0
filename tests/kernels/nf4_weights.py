"""Weights in NF4 by bitsandbytes, and what they stand for in float64, computed here from QLoRA's equations."""

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from lightning_lora.kernels.packed import Packed

# QLoRA, appendix E: the sixteen levels
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def pack(weight: Tensor, block_size: int, *, nested: bool) -> Packed:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type="nf4", quant_storage=torch.uint8
    )
    empty = torch.empty(0)
    constants = (state.state2.absmax, state.offset.reshape(1)) if nested else (empty, empty)
    return Packed(codes.reshape(-1), state.absmax, *constants, block_size)


def in_float64(packed: Packed, shape: tuple[int, ...]) -> Tensor:
    """``w = level[code] (map[absmax] nested_absmax + offset)``, element by element."""
    count = torch.Size(shape).numel()
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).reshape(-1)[:count].long()
    maxima = packed.absmax.double()
    if packed.nested:
        levels = bnb.create_dynamic_map().double()[packed.absmax.long()]
        maxima = levels * packed.nested_absmax.double().repeat_interleave(256)[: len(levels)] + packed.offset.double()
    each = maxima.repeat_interleave(packed.block_size)[:count]
    return (torch.tensor(LEVELS, dtype=torch.float64)[codes] * each).reshape(shape)
