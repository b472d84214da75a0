"""Whether the Triton kernels compute on a device: tried and compared with a reference before they are first used.

Triton can be absent, lack a compiler at run time, or not know a GPU. A fine-tune does not hang on that, because
bitsandbytes, or plain torch, computes the same bits; that it is slower is said once.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from lightning_lora.kernels import four_bits, normal_float
from lightning_lora.kernels.packed import Packed

Reference = Callable[[Packed, Sequence[int], torch.dtype], Tensor]


@dataclass(frozen=True)
class Kernel:
    """What computes the weights of a codebook on CUDA, and what else does.

    Attributes:
        module: In :mod:`lightning_lora.kernels`, imported when it is first tried.
        bits: Of a code.
        reference: Computes the same bits.
        instead: Who that is.
        settings: What the module's ``dequantize(packed, out, ...)`` takes beside.
    """

    module: str
    bits: int
    reference: Reference
    instead: str
    settings: Mapping[str, int] = field(default_factory=dict)


def _normal_float(bits: int) -> Kernel:
    def reference(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return normal_float.dequantize(packed, bits, shape, dtype)

    return Kernel("normal_float_triton", bits, reference, "plain torch", {"bits": bits})


KERNELS = {
    "nf4": Kernel("nf4_triton", 4, partial(four_bits.dequantize, codebook="nf4"), "bitsandbytes"),
    "nf3": _normal_float(3),
    "nf2": _normal_float(2),
}
"""By codebook."""


def triton_kernels(packed: Packed, dtype: torch.dtype, codebook: str = "nf4") -> ModuleType | None:
    """Return the module whose ``dequantize`` computes weights like this one into ``dtype``, or None.

    The first call for a codebook, device, dtype and kind of maxima compiles and waits for the device, so it must not be
    inside a CUDA graph's capture.
    """
    device = packed.codes.device
    return _tried(codebook, device, dtype, packed.nested) if device.type == "cuda" else None


@lru_cache(maxsize=64)
def _tried(codebook: str, device: torch.device, dtype: torch.dtype, nested: bool) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    kernel, reason = KERNELS[codebook], ""
    try:
        kernels = importlib.import_module(f"lightning_lora.kernels.{kernel.module}")
        if agrees(kernels, device, dtype, nested=nested, codebook=codebook):
            return kernels
        reason = f"its result differs from that of {kernel.instead}"
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the Triton kernel for {codebook.upper()} cannot be used on {device} ({reason}); {kernel.instead} dequantizes "
        "instead, with the same result in more time",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def agrees(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, *, nested: bool, codebook: str = "nf4"
) -> bool:
    """Whether the kernels give a small weight with all codes, maxima and an incomplete block bit for bit."""
    kernel = KERNELS[codebook]
    packed, count = _sample(device, kernel.bits, nested=nested)
    out = torch.empty(1, count, dtype=dtype, device=device)
    kernels.dequantize(packed, out, **kernel.settings)
    return torch.equal(out, kernel.reference(packed, out.shape, dtype))


def _sample(device: torch.device, bits: int, *, nested: bool) -> tuple[Packed, int]:
    draw = torch.Generator().manual_seed(0)
    blocks, block_size = 300, 64
    count = blocks * block_size - 6
    codes = torch.randint(256, (-(-count * bits // 8),), generator=draw, dtype=torch.uint8)
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
