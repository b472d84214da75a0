"""How a fresh LoRA starts, by name; where chance alone decides, also the values.

These initializers leave ``B A = 0``: training begins at the base model. Starts that are computed from the base weight
are in :mod:`lightning_lora.nn.decompose` and :mod:`lightning_lora.nn.loftq`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora.nn.decompose import DECOMPOSITIONS, decomposition

Initializer = Callable[[Tensor, Tensor], None]


def kaiming(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A ~ U(-1/sqrt(I), 1/sqrt(I))`` (Kaiming uniform with ``a = sqrt(5)``, as in loralib and PEFT), ``B = 0``."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def gaussian(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A ~ N(0, 1/R^2)``, ``B = 0`` (LoRA paper, section 4.1, with PEFT's standard deviation)."""
    nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    nn.init.zeros_(lora_B)


def orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A = P^T X / 10``, ``B = Y Q / 10`` with Gaussian ``X: (R/2, I)``, ``Y: (O, R/2)``, as PEFT starts it.

    ``P`` and ``Q`` are every other row of one random orthogonal matrix, so that ``Q P^T = 0`` and ``B A = 0`` up to
    rounding, although neither factor is zero. ``R`` has to be even.
    """
    r, half = lora_A.shape[0], lora_A.shape[0] // 2
    rows = nn.init.orthogonal_(torch.empty(r, r, dtype=lora_A.dtype, device=lora_A.device))
    lora_A.copy_(rows[0::2].T @ torch.randn_like(lora_A[:half]) / 10)
    lora_B.copy_(torch.randn_like(lora_B[:, :half]) @ rows[1::2] / 10)


def zero_down(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A = 0``, ``B ~ N(0, 1)``: how the LoRA paper's code starts an embedding, whatever the other layers do."""
    nn.init.zeros_(lora_A)
    nn.init.normal_(lora_B)


INITIALIZERS: dict[str, Initializer] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
"""The starts that chance decides."""

_LATER = {"loftq": "quantization", "eva": "data"}

INITS = (*sorted([*INITIALIZERS, *DECOMPOSITIONS, *_LATER]), "pissa_niter_N (N subspace iterations, e.g. 4)")
"""All names, for people."""


def starts_from(init: str) -> str | None:
    """What a start is computed from: ``"chance"``, ``"weight"``, ``"quantization"`` or ``"data"``; None if unknown."""
    if init in INITIALIZERS:
        return "chance"
    return "weight" if decomposition(init) is not None else _LATER.get(init)
