"""``torch.ops.lightning_lora.dequantize_codebook``: packed weights of any codebook to a dense matrix.

One operator for FP4, which bitsandbytes dequantizes, and for NF3 and NF2: on a CUDA device one Triton kernel computes
these (:mod:`lightning_lora.kernels.normal_float_triton`); on a CPU, and where that kernel cannot run, plain torch does,
with the same bits. Codes and constants are integers, so there is nothing to differentiate, and the operator has no
backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.kernels import four_bits, normal_float
from lightning_lora.kernels.choice import triton_kernels
from lightning_lora.kernels.packed import Packed

BITS = {"fp4": 4, "nf3": 3, "nf2": 2}
"""The codebooks, and how many bits their codes have."""


def dequantize_codebook(packed: Packed, codebook: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight in ``shape`` and ``dtype``, rounded once from ``float32``.

    Args:
        packed: Codes and constants, contiguous and on one device.
        codebook: One of :data:`BITS`.
        shape: What the weight is shaped as; its elements are stored row by row.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        RuntimeError: If the sizes do not fit together, or ``dtype`` is none of these.
        UnsupportedError: If bitsandbytes is needed and not installed.
    """
    weight: Tensor = torch.ops.lightning_lora.dequantize_codebook.default(*packed, codebook, shape, dtype)
    return weight


_LIBRARY: Any = torch.library.Library("lightning_lora", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "dequantize_codebook(Tensor codes, Tensor absmax, Tensor nested_absmax, Tensor offset, int block_size, "
    "str codebook, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "dequantize_codebook", "CPU")
@torch.library.impl(_LIBRARY, "dequantize_codebook", "CUDA")
def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    codebook: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    packed = Packed(codes, absmax, nested_absmax, offset, block_size).as_floats()
    packed.check(shape, dtype, BITS[codebook])
    if codebook == "fp4":
        return four_bits.dequantize(packed, shape, dtype, codebook)
    kernels = triton_kernels(packed, dtype, codebook)
    if kernels is None:
        return normal_float.dequantize(packed, BITS[codebook], shape, dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    kernels.dequantize(packed, out, bits=BITS[codebook])
    return out


@torch.library.register_fake("lightning_lora::dequantize_codebook", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    codebook: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    Packed(codes, absmax, nested_absmax, offset, block_size).check(shape, dtype, BITS[codebook])
    return torch.empty(shape, dtype=dtype, device=codes.device)
