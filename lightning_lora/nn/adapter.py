"""The two contracts a method implements: a frozen config that says what to build, and the adapter module it builds.

A method is one file with one final class of each kind. The layer that holds adapters, injection, merging, counting and
files work through these contracts alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.kind import Kind


class Adapter(nn.Module, ABC):
    """All state of one adapter on one layer: its trainable parameters and the config it was built from.

    Parameters are bare ``nn.Parameter``s rather than ``nn.Linear`` modules, so that nothing which searches a model for
    linear layers (quantizers, sharding policies, another injection) finds the adapter itself.
    """

    additive: ClassVar[bool] = True
    """Whether it adds to the output so far and to the weight so far the same, whatever other adapters did to them."""

    up: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters to which LoRA+ gives a learning rate of their own: the factor ``B``."""

    config: AdapterConfig
    kind: Kind

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Move with the module around it, but stay in full precision when that is cast to half.

        The adapter holds the master weights: an update below half a step of ``bfloat16`` would be rounded away. Modules
        have no public hook for casts; ``.half()``, ``.to(dtype)`` and Lightning's ``*-true`` precisions all end here.
        """
        super()._apply(lambda tensor: _in_full_precision(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]
        return self

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Return the adapted output.

        Args:
            x: The layer's input.
            y: The output so far: the base layer's, or an earlier adapter's.
            base_layer: The frozen layer below.
        """

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight of the plain layer that computes what this adapter over ``weight`` does."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the starting values, also after the parameters were materialized from the meta device."""

    def rebase(self, before: nn.Module, after: nn.Module) -> None:
        """Adjust to a base layer that was just replaced, as quantizing does, by one of slightly other weights."""


def _in_full_precision(before: Tensor, after: Tensor) -> Tensor:
    shrunk = before.dtype == torch.float32 and after.dtype in (torch.bfloat16, torch.float16)
    return before.to(after.device) if shrunk else after


class AdapterConfig(ABC):
    """A method with its hyperparameters: a frozen value, valid as soon as it exists."""

    method: ClassVar[str]

    decisive: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that decide what saved tensors mean: with other values they are another function."""

    dropout: float = 0.0
    """Probability of zeroing an element of the input while training; a field where the method has it."""

    @abstractmethod
    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` if a layer of this kind and shape cannot be adapted so."""

    @abstractmethod
    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Adapter:
        """Make an adapter for ``base_layer`` with parameters of ``dtype`` on ``device``."""
