"""How a fresh LoRA starts. Every initializer leaves ``B A = 0``: training begins at the base model."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

Initializer = Callable[[Tensor, Tensor], None]


def kaiming(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A ~ U(-1/sqrt(I), 1/sqrt(I))`` (Kaiming uniform with ``a = sqrt(5)``, as in loralib and PEFT), ``B = 0``."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def gaussian(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A ~ N(0, 1/R^2)``, ``B = 0`` (LoRA paper, section 4.1, with PEFT's standard deviation)."""
    nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    nn.init.zeros_(lora_B)


def zero_down(lora_A: Tensor, lora_B: Tensor) -> None:
    """``A = 0``, ``B ~ N(0, 1)``: how the LoRA paper's code starts an embedding, whatever the other layers do."""
    nn.init.zeros_(lora_A)
    nn.init.normal_(lora_B)


INITIALIZERS: dict[str, Initializer] = {"kaiming": kaiming, "gaussian": gaussian}
