"""The maxima of blocks inside of Triton kernels: as :mod:`lightning_lora.kernels.maxima` computes them.

Importing this needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_maximum(
    absmax,
    nested_absmax,
    offset,
    nested_levels,
    block,
    inside,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """The ``float32`` maximum of each block that is ``inside``."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        constant = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        maximum = tl.load(nested_levels + code) * constant + tl.load(offset)
    else:
        maximum = tl.load(absmax + block, mask=inside, other=0.0)
    return maximum
