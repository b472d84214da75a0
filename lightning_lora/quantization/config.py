"""How frozen base weights are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from lightning_lora.kernels.packed import DTYPES

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class NF4Config:
    """4-bit NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

    Each block of ``block_size`` weights is divided by its absolute maximum and rounded to one of 16 levels. The maxima
    are stored in ``float32``, or with ``double_quant`` in 8 bits with one ``float32`` per 256 of them: 4.127 instead of
    4.5 bits per weight.

    Args:
        block_size: Weights that share a maximum; one of 32, 64, ..., 4096.
        double_quant: Whether to quantize the maxima too.
        compute_dtype: What the weight is dequantized to for each product. None follows the input, or autocast where it
            is on: the Trainer's precision.

    Raises:
        ValueError: If a value is none of the choices.
    """

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be True or False, got {self.double_quant!r}")
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            choices = ", ".join(map(str, DTYPES))
            raise ValueError(f"compute_dtype must be None or one of {choices}, got {self.compute_dtype!r}")

    @property
    def storage(self) -> str:
        """In a few words, as ``print(model)``, summaries and checkpoints say it: ``nf4/64 double-quantized``."""
        return f"nf4/{self.block_size}" + (" double-quantized" if self.double_quant else "")

    @classmethod
    def from_storage(cls, words: str) -> NF4Config:
        """The config that :attr:`storage` describes.

        Raises:
            ValueError: If it describes none.
        """
        found = re.fullmatch(r"nf4/(\d+)( double-quantized)?", words)
        if found is None:
            raise ValueError(f"{words!r} is no NF4 storage; one reads {cls().storage!r}")
        return cls(block_size=int(found[1]), double_quant=found[2] is not None)
