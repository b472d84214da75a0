"""How frozen base weights are stored: one frozen config for each format, and the words files know it by."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from lightning_lora.kernels.packed import DTYPES

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class QuantizationConfig(ABC):
    """What every storage has: a name, words for files, and what its weights are multiplied in.

    Attributes:
        name: What users write: ``quantization="nf4"``.
        needs_start: Whether so much of a weight is lost that adapters have to start from what is (``init="loftq"``).
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.
    """

    __slots__ = ()

    name: ClassVar[str]
    needs_start: ClassVar[bool] = False
    compute_dtype: torch.dtype | None

    @property
    @abstractmethod
    def storage(self) -> str:
        """In a few words, as ``print(model)``, summaries and checkpoints say it: ``nf4/64 double-quantized``."""

    @classmethod
    @abstractmethod
    def from_storage(cls, words: str) -> Self:
        """The config that :attr:`storage` describes.

        Raises:
            ValueError: If it describes none.
        """

    def _check_compute_dtype(self) -> None:
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            choices = ", ".join(map(str, DTYPES))
            raise ValueError(f"compute_dtype must be None or one of {choices}, got {self.compute_dtype!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig(QuantizationConfig):
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

    bits: ClassVar[int]

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be True or False, got {self.double_quant!r}")
        self._check_compute_dtype()

    @property
    def storage(self) -> str:
        """Name, block size, and whether the maxima are quantized too: ``nf4/64 double-quantized``."""
        return f"{self.name}/{self.block_size}" + (" double-quantized" if self.double_quant else "")

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

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If a value is none of the choices.
    """

    name: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4


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
