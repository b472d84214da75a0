"""NF3 and NF2 dequantization in one Triton kernel: codes, levels, 8-bit maxima and their offset in one pass.

Importing this needs Triton. As with NF4 (:mod:`lightning_lora.kernels.nf4_triton`) launches tune nothing, and what is
proven without a GPU is what Triton's interpreter computes and what instructions the compiler makes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.kernels.maxima import nested_map
from lightning_lora.kernels.maxima_triton import block_maximum
from lightning_lora.kernels.normal_float import table
from lightning_lora.kernels.packed import NESTED_BLOCK, Packed

WARPS = 4
TILE = 4096
"""Weights to a program: the largest block size, so that every program starts at the start of a block."""
GROUP = 8
"""Codes to a thread at a time. They are two or three whole bytes, loaded one by one: an eighth or a fifth of what is
written, from lines that stay in the nearest cache. The eight weights are 16 bytes in half precision, the widest store
there is."""


def dequantize(packed: Packed, out: Tensor, *, bits: int) -> None:
    """Write the weight into ``out``, contiguous and of the weight's size; constants are ``float32``."""
    count = out.numel()
    if count == 0:
        return
    nested = nested_map(out.device) if packed.nested else packed.nested_absmax
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(count, TILE),)](
            packed.codes,
            packed.absmax,
            packed.nested_absmax,
            packed.offset,
            nested,
            table(bits, out.device),
            out,
            count,
            packed.codes.numel(),
            BLOCK=packed.block_size,
            NESTED=packed.nested,
            NESTED_BLOCK=NESTED_BLOCK,
            BITS=bits,
            GROUP=GROUP,
            ITEMS=32 * WARPS,
            STEPS=TILE // (32 * WARPS * GROUP),
            num_warps=WARPS,
            # A product and a sum in one rounding instead of two would not be the bits of plain torch.
            enable_fp_fusion=False,
        )


@triton.jit
def _dequantize(
    codes,
    absmax,
    nested_absmax,
    offset,
    nested_levels,
    levels,
    out,
    count,
    size,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ITEMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (GROUP * ITEMS * STEPS)  # a weight can have more than 2^31 elements
    within = tl.arange(0, GROUP)
    for step in tl.static_range(STEPS):
        item = start // GROUP + step * ITEMS + tl.arange(0, ITEMS)
        inside = item * GROUP < count
        maximum = block_maximum(
            absmax, nested_absmax, offset, nested_levels, item * GROUP // BLOCK, inside, NESTED, NESTED_BLOCK
        )
        word = tl.zeros((ITEMS,), dtype=tl.int32)  # the group as one number, its first code lowest
        for byte in tl.static_range(BITS):
            position = item * BITS + byte  # the last group of a weight may be cut off
            word |= tl.load(codes + position, mask=position < size, other=0).to(tl.int32) << (8 * byte)
        code = (word[:, None] >> (BITS * within[None, :])) & ((1 << BITS) - 1)
        weight = tl.load(levels + code) * maximum[:, None]
        element = item[:, None] * GROUP + within[None, :]
        tl.store(out + element, weight.to(out.dtype.element_ty), mask=element < count)
