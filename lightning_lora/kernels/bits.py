"""Codes of fewer than eight bits in bytes, without waste: three bits are really three.

Code ``i`` of a weight takes the bits from ``b i`` on, lowest first, as if all bytes were one number. Four codes of two
or three bits then are an item of eight or twelve, and eight codes are ``b`` whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PER_ITEM = 4
"""Codes in an item."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``ceil(N b / 8)`` bytes of ``N`` codes of ``b`` bits; ``b`` is 2 or 3.

    Args:
        codes: ``int32`` of shape ``(N,)``, each below ``2^b``.
        bits: ``b``.
    """
    groups = F.pad(codes, (0, -len(codes) % 8)).view(-1, 8)
    shifts = bits * torch.arange(8, dtype=torch.int32, device=codes.device)
    words = (groups << shifts).sum(1, dtype=torch.int32)
    out = 8 * torch.arange(bits, dtype=torch.int32, device=codes.device)
    return ((words[:, None] >> out) & 255).to(torch.uint8).view(-1)[: -(-len(codes) * bits // 8)]


def items(packed: Tensor, bits: int) -> Tensor:
    """Return the items of four codes each, ``int32``, the first code lowest; the last ones may be padding."""
    if bits == 2:
        return packed.int()
    low, middle, high = F.pad(packed, (0, -len(packed) % 3)).view(-1, 3).int().unbind(1)
    return torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1).view(-1)
