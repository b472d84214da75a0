"""``torch.ops.lightning_lora.dequantize_codebook``: packed weights of any codebook to a dense matrix.

One operator for FP4, which bitsandbytes dequantizes, and for NF3 and NF2: on a CUDA device one Triton kernel computes
these (:mod:`lightning_lora.kernels.normal_float_triton`); on a CPU, and where that kernel cannot run, plain torch does,
with the same bits. Codes and constants are integers, so there is nothing to differentiate, and the operator has no
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.kernels import four_bits, normal_float
from lightning_lora.kernels.choice import triton_kernels
from lightning_lora.kernels.operators import define
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
    weight: Tensor = _DEQUANTIZE(*packed, shape, dtype, codebook)
    return weight


def _dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype, codebook: str) -> Tensor:
    if codebook == "fp4":
        return four_bits.dequantize(packed, shape, dtype, codebook)
    kernels = triton_kernels(packed, dtype, codebook)
    if kernels is None:
        return normal_float.dequantize(packed, BITS[codebook], shape, dtype)
    out = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    kernels.dequantize(packed, out, bits=BITS[codebook])
    return out


def _check(packed: Packed, shape: Sequence[int], dtype: torch.dtype, codebook: str) -> None:
    packed.check(shape, dtype, BITS[codebook])


_DEQUANTIZE = define("dequantize_codebook", "SymInt[] shape, ScalarType dtype, str codebook", _dequantize, _check)
