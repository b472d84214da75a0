"""How frozen base weights are stored: one frozen config for each format, and the words files know it by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from typing_extensions import Self

from lightning_lora.kernels.packed import DTYPES, sizes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each packed tensor of a weight, by its name in the layer; ``int32`` are bits of ``float32``."""


class QuantizationConfig(Protocol):
    """What every storage has: a name, words for files, and what its weights are multiplied in.

    A protocol, because parsers of YAML take a class for a plain value only if all its bases are dataclasses.
    """

    name: ClassVar[str]
    """What users write: ``quantization="nf4"``."""

    needs_start: ClassVar[bool]
    """Whether so much of a weight is lost that adapters have to start from what is (``init="loftq"``)."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What the weight is dequantized to for each product. None follows the input, or autocast where it is on."""

    @property
    def storage(self) -> str:
        """In a few words, as ``print(model)``, summaries and checkpoints say it: ``nf4/64 double-quantized``."""

    def layout(self, out_features: int, in_features: int) -> Layout:
        """The packed tensors of a weight of shape ``(O, I)``."""

    def __hash__(self) -> int:
        """Configs are values."""

    @classmethod
    def from_storage(cls, words: str) -> Self:
        """The config that :attr:`storage` describes.

        Raises:
            ValueError: If it describes none.
        """


def packed_bytes(config: QuantizationConfig, out_features: int, in_features: int) -> int:
    """Return the bytes of a weight of shape ``(O, I)``: codes and all constants."""
    layout = config.layout(out_features, in_features)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` unless a weight can be dequantized to ``dtype``."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"compute_dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig:
    """Weights as the nearest of ``2^bits`` levels, in blocks that are divided by their absolute maximum.

    ``w = level[code] m``. The maxima ``m`` are stored in ``float32``, or with ``double_quant`` in 8 bits with one
    ``float32`` per 256 of them: ``bits + 32 / B`` or ``bits + 8 / B + 32 / (256 B)`` bits per weight for blocks of
    ``B`` (QLoRA, arXiv 2305.14314, section 3).

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Attributes:
        bits: Of a code.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    needs_start: ClassVar[bool] = False

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be True or False, got {self.double_quant!r}")
        check_compute_dtype(self.compute_dtype)

    @property
    def storage(self) -> str:
        """Name, block size, and whether the maxima are quantized too: ``nf4/64 double-quantized``."""
        return f"{self.name}/{self.block_size}" + (" double-quantized" if self.double_quant else "")

    def layout(self, out_features: int, in_features: int) -> Layout:
        """Codes, and a constant per block: in 8 bits, with constants of their own, when double-quantized."""
        counts = sizes(out_features * in_features, self.bits, self.block_size, nested=self.double_quant)
        dtypes = (torch.uint8, torch.uint8 if self.double_quant else torch.int32, torch.int32, torch.int32)
        names = ("codes", "absmax", "nested_absmax", "offset")
        return {name: ((count,), dtype) for name, count, dtype in zip(names, counts, dtypes, strict=True)}

    @classmethod
    def from_storage(cls, words: str) -> Self:
        """The config that :attr:`storage` describes.

        Raises:
            ValueError: If it describes none.
        """
        found = re.fullmatch(rf"{cls.name}/(\d+)( double-quantized)?", words)
        if found is None:
            raise ValueError(f"{words!r} is no {cls.name.upper()} storage; one reads {cls().storage!r}")
        return cls(block_size=int(found[1]), double_quant=found[2] is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class NF4Config(CodebookConfig):
    """4-bit NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

    Each block of ``block_size`` weights is divided by its absolute maximum and rounded to one of 16 levels, which are
    quantiles of a Gaussian. 4.127 bits per weight, or 4.5 without ``double_quant``.

    With ``fuse_delta`` a LoRA without dropout multiplies once, ``y = x (W + s B A)^T``, in both passes. The weight is
    summed in ``float32`` and rounded to the compute dtype once, by up to half a step of the *weight's* size, where two
    branches round two outputs. In ``bfloat16`` an update far below the weight is then noise about its true value in
    single weights, and right on average; in ``float32`` the two differ by the order of summation. It saves skinny
    products and costs a product ``B A`` per pass, so it is for many tokens and slow launches; no device has been
    measured on which it is faster. Under ``torch.compile``, over several active adapters (all but the first), and with
    dropout there are two branches as ever.

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.
        fuse_delta: Whether to add the update to the weight before the one rounding, instead of to the output.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4

    fuse_delta: bool = False

    def __post_init__(self) -> None:
        CodebookConfig.__post_init__(self)
        if not isinstance(self.fuse_delta, bool):
            raise ValueError(f"fuse_delta must be True or False, got {self.fuse_delta!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FP4Config(CodebookConfig):
    """4-bit floating point as bitsandbytes has it: a sign, two bits of exponent, one of mantissa.

    The levels are 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives. On Gaussian weights they lose a third more
    than those of NF4 (relative error 0.122 against 0.092) at the same size; it is for models that came in FP4.

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str] = "fp4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class NF3Config(CodebookConfig):
    """3-bit NormalFloat: the eight levels that the quantiles of NF4 become with three bits.

    3.127 bits per weight, or 3.5 without ``double_quant``. On Gaussian weights a relative error of 0.197, twice that of
    NF4: adapters do well to start from it, with ``init="loftq"``.

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str] = "nf3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class NF2Config(CodebookConfig):
    """2-bit NormalFloat: the levels -1, 0, 0.4358 and 1 that the quantiles of NF4 become with two bits.

    2.127 bits per weight, or 2.5 without ``double_quant``. On Gaussian weights a relative error of 0.564: a plain
    adapter starts at another model. Meant for ``init="loftq"`` (arXiv 2310.08659); quantizing under any other warns.

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str] = "nf2"
    bits: ClassVar[int] = 2
    needs_start: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config:
    """8-bit integers with a maximum for each row, as LLM.int8() stores weights (arXiv 2208.07339).

    ``8 + 32 / I`` bits per weight of a layer with ``I`` inputs; on Gaussian weights a relative error below 0.01.
    Activations are not rounded: see :mod:`lightning_lora.quantization.int8`.

    Args:
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If it is none of the choices.
    """

    name: ClassVar[str] = "int8"
    needs_start: ClassVar[bool] = False

    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_compute_dtype(self.compute_dtype)

    @property
    def storage(self) -> str:
        """``int8/row``."""
        return f"{self.name}/row"

    def layout(self, out_features: int, in_features: int) -> Layout:
        """A code for each weight, a maximum for each row."""
        return {"codes": ((out_features, in_features), torch.int8), "absmax": ((out_features,), torch.int32)}

    @classmethod
    def from_storage(cls, words: str) -> Self:
        """The config that :attr:`storage` describes.

        Raises:
            ValueError: If it describes none.
        """
        if words != cls().storage:
            raise ValueError(f"{words!r} is no INT8 storage; it reads {cls().storage!r}")
        return cls()
