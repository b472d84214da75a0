"""What can take the place of ``torch.optim.Adam`` and ``AdamW``, by the name users write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.optim.badam import BAdam
from lightning_lora.optim.galore_adamw import GaLore
from lightning_lora.optim.paged_adamw import PagedAdamW8bit


class Swap(Protocol):
    """A frozen value that says which optimizer, and with what."""

    name: ClassVar[str]
    """What users write: ``optimizer="badam"``."""

    def build(self, optimizer: Optimizer, model: nn.Module, names: Mapping[Tensor, str]) -> Optimizer:
        """Return the optimizer that is to stand in the place of another.

        Args:
            optimizer: A ``torch.optim.Adam`` or ``AdamW`` that has not stepped yet.
            model: What is trained.
            names: Names of the parameters.

        Raises:
            OptimizerError: If the optimizer computes something that the new one cannot.
        """


AnySwap = PagedAdamW8bit | GaLore | BAdam
SWAPS: dict[str, type[AnySwap]] = {swap.name: swap for swap in (PagedAdamW8bit, GaLore, BAdam)}
FOR_FULL_TRAINING = (GaLore, BAdam)
"""Those that save what full training needs and adapters do not: moments of whole matrices."""
