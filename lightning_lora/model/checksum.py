"""A checksum of a weight's exact bits, to tell whether two of them are the same without holding both."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(weight: Tensor) -> int:
    """Return the sum of the elements' bit patterns: the same on every device and in every order of summation."""
    return int(weight.detach().view(_BITS[weight.element_size()]).sum(dtype=torch.int64))
