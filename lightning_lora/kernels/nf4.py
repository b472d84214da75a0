"""``torch.ops.lightning_lora.dequantize_nf4``: packed NF4 weights to a dense matrix, as one operator torch can trace.

On a CUDA device one Triton kernel computes it (:mod:`lightning_lora.kernels.nf4_triton`); on a CPU, and where that
kernel cannot run, bitsandbytes does (:mod:`lightning_lora.kernels.four_bits`), with the same bits. Codes and
constants are integers, so there is nothing to differentiate, and the operator has no backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.kernels import four_bits
from lightning_lora.kernels.choice import triton_kernels
from lightning_lora.kernels.operators import define
from lightning_lora.kernels.packed import Packed


def dequantize_nf4(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weight in ``shape`` and ``dtype``, rounded once from ``float32``.

    Args:
        packed: Codes and constants, contiguous and on one device.
        shape: What the weight is shaped as; its elements are stored row by row.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        RuntimeError: If the sizes do not fit together, or ``dtype`` is none of these.
        UnsupportedError: If bitsandbytes is not installed.
    """
    weight: Tensor = _DEQUANTIZE(*packed, shape, dtype)
    return weight


def dequantize_nf4_plus(
    packed: Packed, shape: Sequence[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return ``W + s B A``, summed in ``float32`` and rounded to ``dtype`` once: one product instead of three.

    The sum is as near to ``W + s B A`` as ``dtype`` can hold it, however small the update: it is rounded along with the
    weight, by up to half a step of the *weight's* size, which is noise about zero and no loss. Added to a weight that
    is in half precision already, an update is lost: of one a thousand times smaller than the weight half remains, of
    one ten thousand times smaller a tenth. Two branches, ``x W^T + s (x A^T) B^T``, round the output instead.

    There is no backward: use it where nothing is trained, or in one that computes the weight again.

    Args:
        packed: Codes and constants of ``W``.
        shape: ``(O, I)``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        lora_A: Of shape ``(R, I)``.
        lora_B: Of shape ``(O, R)``, in ``lora_A``'s dtype.
        scaling: The factor ``s``.

    Raises:
        RuntimeError: If sizes or dtypes do not fit together.
    """
    weight: Tensor = _DEQUANTIZE_PLUS(*packed, shape, dtype, lora_A, lora_B, scaling)
    return weight


def _dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    kernels = triton_kernels(packed, dtype)
    if kernels is None:
        return four_bits.dequantize(packed, shape, dtype, "nf4")
    out = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    kernels.dequantize(packed, out)
    return out


def _dequantize_plus(
    packed: Packed, shape: Sequence[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    kernels = triton_kernels(packed, dtype) if shape[1] % 2 == 0 else None  # its rows are whole bytes
    if kernels is None:
        weight = four_bits.dequantize(packed, shape, torch.float32, "nf4")
        return weight.addmm_(lora_B.float(), lora_A.float(), alpha=scaling).to(dtype)
    out = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    kernels.dequantize_plus(packed, out, lora_A.contiguous(), lora_B.contiguous(), scaling)
    return out


def _check_plus(
    packed: Packed, shape: Sequence[int], dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> None:
    packed.check(shape, dtype)
    found = (tuple(lora_B.shape), tuple(lora_A.shape), lora_B.dtype)
    expected = ((shape[0], lora_A.shape[0]), (lora_A.shape[0], shape[1]), lora_A.dtype)
    if found != expected:
        raise RuntimeError(
            f"the update of a weight of shape {tuple(shape)} has factors (O, R) and (R, I) of one dtype; got "
            f"{tuple(lora_B.shape)} in {lora_B.dtype} and {tuple(lora_A.shape)} in {lora_A.dtype}"
        )


_DEQUANTIZE = define("dequantize_nf4", "SymInt[] shape, ScalarType dtype", _dequantize, Packed.check)
_DEQUANTIZE_PLUS = define(
    "dequantize_nf4_plus",
    "SymInt[] shape, ScalarType dtype, Tensor lora_A, Tensor lora_B, float scaling",
    _dequantize_plus,
    _check_plus,
)
