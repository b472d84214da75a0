"""NF4 dequantization in one Triton kernel: levels, 8-bit maxima and their offset in one pass over the weight.

Importing this needs Triton. Launches take one configuration and tune nothing: the work is a stream, and what decides is
how a thread's loads and stores line up, which the constants below say. Not run on a GPU yet by this version: what is
proven is what Triton's interpreter computes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.kernels.maxima import nested_map
from lightning_lora.kernels.maxima_triton import block_maximum
from lightning_lora.kernels.packed import NESTED_BLOCK, Packed

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen levels (QLoRA, appendix E)."""

WARPS = 4
TILE = 4096
"""Weights to a program: the largest block size, so that every program starts at the start of a block, whatever the
size, and a layer of 4096 x 4096 is 4096 programs, 30 for each processor of the largest GPUs."""
WORD = 8
"""Codes in 32 bits. A thread takes one such word at a time and writes 8 weights: 16 bytes in half precision, the widest
store there is. Thread beside thread, both the loads (4 bytes each) and the stores of a warp are without gaps, and the
maximum of the block, found once for each word, stands for 8 weights (no block is smaller than 32)."""
BYTE = 2
"""Codes in 8 bits: what a thread takes where codes are not aligned to 4 bytes, or end inside of such a word."""
DELTA_ROWS, DELTA_COLUMNS, DELTA_RANKS = 64, 128, 32
"""A program of :func:`dequantize_plus`: 32 KiB of float32 sums in the registers of 8 warps, 32 ranks at a time."""


def dequantize(packed: Packed, out: Tensor) -> None:
    """Write the weight into ``out``, contiguous and of the weight's size; constants are ``float32``."""
    count = out.numel()
    if count == 0:
        return
    codes, per_item = _items(packed.codes)
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(count, TILE),)](
            codes,
            *_constants(packed),
            out,
            count,
            BLOCK=packed.block_size,
            NESTED=packed.nested,
            NESTED_BLOCK=NESTED_BLOCK,
            PER_ITEM=per_item,
            ITEMS=32 * WARPS * WORD // per_item,
            STEPS=TILE // (32 * WARPS * WORD),
            num_warps=WARPS,
            # A product and a sum in one rounding instead of two would not be bitsandbytes' bits.
            enable_fp_fusion=False,
        )


def dequantize_plus(packed: Packed, out: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Write ``W + s B A`` into ``out`` of shape ``(O, I)``, summed in ``float32`` and rounded once.

    Args:
        packed: The weight ``W``; constants are ``float32``.
        out: Contiguous; ``I`` is even.
        lora_A: Of shape ``(R, I)``, contiguous.
        lora_B: Of shape ``(O, R)``, contiguous and in ``lora_A``'s dtype.
        scaling: The factor ``s``.
    """
    rows, columns = out.shape
    codes, per_item = _items(packed.codes)
    if columns % per_item:
        codes, per_item = packed.codes, BYTE
    grid = (triton.cdiv(rows, DELTA_ROWS), triton.cdiv(columns, DELTA_COLUMNS))
    with torch.cuda.device_of(out):
        _dequantize_plus[grid](
            codes,
            *_constants(packed),
            lora_A,
            lora_B,
            float(scaling),
            out,
            rows,
            columns,
            lora_A.shape[0],
            BLOCK=packed.block_size,
            NESTED=packed.nested,
            NESTED_BLOCK=NESTED_BLOCK,
            PER_ITEM=per_item,
            ROWS=DELTA_ROWS,
            ITEMS=DELTA_COLUMNS // per_item,
            RANKS=DELTA_RANKS,
            num_warps=2 * WARPS,
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
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    PER_ITEM: tl.constexpr,
    ITEMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (PER_ITEM * ITEMS * STEPS)  # a weight can have more than 2^31 elements
    within = tl.arange(0, PER_ITEM)
    for step in tl.static_range(STEPS):
        item = start // PER_ITEM + step * ITEMS + tl.arange(0, ITEMS)
        inside = item * PER_ITEM < count
        maximum = block_maximum(
            absmax, nested_absmax, offset, nested_levels, item * PER_ITEM // BLOCK, inside, NESTED, NESTED_BLOCK
        )
        # A table of 64 bytes: one line of the nearest cache, read without conflicts. Choosing among 16 values takes
        # 15 instructions for each weight, which is more than a processor has in the time its memory takes.
        code = _codes(tl.load(codes + item, mask=inside, other=0)[:, None], within[None, :])
        weight = tl.load(levels + code) * maximum[:, None]
        element = item[:, None] * PER_ITEM + within[None, :]
        tl.store(out + element, weight.to(out.dtype.element_ty), mask=element < count)


@triton.jit
def _dequantize_plus(
    codes,
    absmax,
    nested_absmax,
    offset,
    nested_levels,
    levels,
    lora_A,
    lora_B,
    scaling,
    out,
    rows,
    columns,
    rank,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    PER_ITEM: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    RANKS: tl.constexpr,
):
    COLUMNS: tl.constexpr = ITEMS * PER_ITEM
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        down = tl.load(
            lora_A + r[:, None] * columns + column[None, :],
            mask=(r < rank)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        up = tl.load(
            lora_B + row[:, None] * rank + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0
        )
        total = tl.dot(up, down, total, input_precision="ieee")  # the default would cut float32 factors to 10 bits
    position = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    item = row[:, None] * (columns // PER_ITEM) + position[None, :]
    inside = (row < rows)[:, None] & (position * PER_ITEM < columns)[None, :]
    maximum = block_maximum(
        absmax, nested_absmax, offset, nested_levels, item * PER_ITEM // BLOCK, inside, NESTED, NESTED_BLOCK
    )
    within = tl.arange(0, PER_ITEM)
    code = _codes(tl.load(codes + item, mask=inside, other=0)[:, :, None], within[None, None, :])
    weight = tl.reshape(tl.load(levels + code) * maximum[:, :, None], (ROWS, COLUMNS)) + scaling * total
    tl.store(
        out + row[:, None] * columns + column[None, :],
        weight.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _codes(item, within):
    """The 4-bit codes of an item, in order: of each byte, lowest first, the high half comes before the low one."""
    return (item.to(tl.int32) >> (4 * (within ^ 1))) & 15


def _items(codes: Tensor) -> tuple[Tensor, int]:
    """Codes as the largest items that a thread can load, and how many codes those hold."""
    aligned = codes.numel() % 4 == 0 and codes.data_ptr() % 4 == 0
    return (codes.view(torch.int32), WORD) if aligned else (codes, BYTE)


def _constants(packed: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = packed.codes.device
    nested = nested_map(device) if packed.nested else packed.nested_absmax
    return packed.absmax, packed.nested_absmax, packed.offset, nested, _levels(device)


@lru_cache(maxsize=16)
def _levels(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for all later calls, also those that record gradients
        return torch.tensor(LEVELS, dtype=torch.float32, device=device)
