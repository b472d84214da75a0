"""The two contracts a method implements: a frozen config that says what to build, and the adapter module it builds.

A method is one file with one final class of each kind. The layer that holds adapters, injection, merging, counting and
files work through these contracts alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.kind import Kind
from lightning_lora.nn.pieces import PieceMerger


class Adapter(nn.Module, ABC):
    """All state of one adapter on one layer: its trainable parameters and the config it was built from.

    Parameters are bare ``nn.Parameter``s rather than ``nn.Linear`` modules, so that nothing which searches a model for
    linear layers (quantizers, sharding policies, another injection) finds the adapter itself.

    Three methods every adapter has, and one of low rank has a fourth, :meth:`update_factors`. The others, but for
    :meth:`spectral_factors`, are for adapters that start from the base weight; the base itself is never rewritten, but
    one that is going to be quantized may be quantized without what the adapter starts with.
    """

    additive: ClassVar[bool] = True
    """Whether it adds to the output so far and to the weight so far the same, whatever other adapters did to them."""

    up: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters to which LoRA+ gives a learning rate of their own: the factor ``B``."""

    config: AdapterConfig
    kind: Kind
    started: bool = True
    """Whether its starting values are there; an adapter without them refuses to compute."""
    trained_over: str | None = None
    """How the base was stored over which its values were trained, until the base here is stored so; None is as here."""

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

    def over(self, x: Tensor, base_layer: nn.Module) -> Tensor:
        """Return the adapted output of a layer that was not called yet: for an adapter that can do better together.

        Args:
            x: The layer's input.
            base_layer: The frozen layer below.
        """
        y: Tensor = self(x, base_layer(x), base_layer)
        return y

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight of the plain layer that computes what this adapter over ``weight`` does."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the starting values, also after the parameters were materialized from the meta device."""

    def piece_merger(self) -> PieceMerger | None:
        """Return what merges some rows of the weight alone, as :meth:`merged` does, or None where they need the others.

        Large weights are then merged a few rows at a time, several times as fast and without a second weight in memory.
        """
        return None

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return what it adds to the original base weight as factors, or None where that is no product of two.

        Returns:
            ``A`` of shape ``(R, I)`` and ``B`` of shape ``(O, R)``: as a matrix, the merged weight is ``W + B A``. All
            scaling is in them.
        """
        return None

    def spectral_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return factors of a matrix with the singular values of the update: smaller ones, where it knows them.

        ``B A`` and ``B L`` have the same ones if ``A = L Q`` with orthonormal rows of ``Q``, since
        ``A A^T = L L^T``. They say how long the update is, not where it points.
        """
        return self.update_factors()

    def start(self, weight: Callable[[], Tensor]) -> None:
        """Compute what of the starting values depends on the base weight; called once, before the adapter is used.

        Args:
            weight: Gives the base weight as the layer stores it, in ``float32`` at least.

        Raises:
            ValueError: If nothing can be computed from it.
        """

    def take_off(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return what to quantize in place of ``weight``, or None to quantize it as it is.

        An adapter that returns a weight computes, from then on, over a base that lacks the rest.

        Args:
            weight: The base weight as the layer stores it.
            rounded: What a weight is once it has been quantized and read back in ``float32``.
        """
        return None

    def put_back(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the output ``y`` for the input ``x`` with what was taken off: what an inactive adapter does."""
        return y

    def restored(self, weight: Tensor) -> Tensor:
        """Return the base's ``weight`` with what was taken off."""
        return weight

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Take up the start of a saved adapter, before the base is quantized; the rest of its state is loaded later."""

    def stands_on_same_base(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a saved state of this adapter goes with what was taken off the base here, bit for bit."""
        return True

    def plain(self) -> Adapter:
        """Return the adapter that does to the original base what this one does to its own: the one to save."""
        return self

    def rebase(self, before: nn.Module, after: nn.Module) -> None:
        """Adjust to a base layer that was just replaced, as quantizing does, by one of slightly other weights."""


def _in_full_precision(before: Tensor, after: Tensor) -> Tensor:
    shrunk = before.dtype == torch.float32 and after.dtype in (torch.bfloat16, torch.float16)
    return before.to(after.device) if shrunk else after


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """A method with its hyperparameters: a frozen value, valid as soon as it exists."""

    method: ClassVar[str]

    decisive: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that decide what saved tensors mean: with other values they are another function."""

    @property
    def dropout(self) -> float:
        """Probability of zeroing an element of the input while training; a field where the method has it."""
        return 0.0

    @property
    def starts_from(self) -> str:
        """What starting values are computed from: ``"chance"``, ``"weight"``, ``"quantization"`` or ``"data"``."""
        return "chance"

    @abstractmethod
    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` if a layer of this kind and shape cannot be adapted so."""

    @abstractmethod
    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Adapter:
        """Make an adapter for ``base_layer`` with parameters of ``dtype`` on ``device``."""
