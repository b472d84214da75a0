"""Whether the Triton kernels compute on a device: tried and compared with bitsandbytes before they are first used.

Triton can be absent, lack a compiler at run time, or not know a GPU. A fine-tune does not hang on that, because
bitsandbytes computes the same bits; that it is slower is said once.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import lru_cache
from types import ModuleType

import torch

from lightning_lora.kernels import four_bits
from lightning_lora.kernels.packed import Packed


def triton_kernels(packed: Packed, dtype: torch.dtype) -> ModuleType | None:
    """Return :mod:`lightning_lora.kernels.nf4_triton` if it computes weights like this one into ``dtype``, else None.

    The first call for a device, dtype and kind of maxima compiles and waits for the device, so it must not be inside a
    CUDA graph's capture.
    """
    device = packed.codes.device
    return _tried(device, dtype, packed.nested) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _tried(device: torch.device, dtype: torch.dtype, nested: bool) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    reason = ""
    try:
        kernels = importlib.import_module("lightning_lora.kernels.nf4_triton")
        if agrees(kernels, device, dtype, nested=nested):
            return kernels
        reason = "its result differs from bitsandbytes'"
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the Triton kernel for NF4 cannot be used on {device} ({reason}); bitsandbytes dequantizes instead, with the "
        "same result and up to twice the time",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def agrees(kernels: ModuleType, device: torch.device, dtype: torch.dtype, *, nested: bool) -> bool:
    """Whether the kernels give a small weight with all codes, maxima and an incomplete block bit for bit."""
    packed, count = _sample(device, nested=nested)
    out = torch.empty(1, count, dtype=dtype, device=device)
    kernels.dequantize(packed, out)
    expected = four_bits.dequantize(packed, out.shape, dtype, "nf4")
    return torch.equal(out, expected)


def _sample(device: torch.device, *, nested: bool) -> tuple[Packed, int]:
    draw = torch.Generator().manual_seed(0)
    blocks, block_size = 300, 64
    count = blocks * block_size - 6
    codes = torch.randint(256, (count // 2,), generator=draw, dtype=torch.uint8)
    constants = torch.rand(blocks, generator=draw)
    if nested:
        absmax = torch.randint(256, (blocks,), generator=draw, dtype=torch.uint8)
        nested_absmax, offset = constants[:2].contiguous(), constants[2:3].contiguous()
    else:
        absmax, nested_absmax, offset = constants, torch.empty(0), torch.empty(0)
    with torch.inference_mode(False):
        return Packed(
            codes.to(device), absmax.to(device), nested_absmax.to(device), offset.to(device), block_size
        ), count
