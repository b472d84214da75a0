"""The contract of what stands in the place of a module that reads weights without calling layers.

Such a module is taken apart while one of its weights is adapted: each becomes a layer of its own that can hold adapters
or be quantized, and the module computes with those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn


class Split(nn.Module, ABC):
    """A module taken apart. It computes what the original does and can be put together again."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The layers its weights have become, by name; each is a child of that name."""

    @abstractmethod
    def joined(self, layers: Mapping[str, nn.Module] | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the original kind of module with the weights of ``layers``; ``self`` is left as it is.

        Args:
            layers: A plain or quantized layer for each of the parts; None takes those that are here.
            dtype: What to store the weights in; None keeps what they are in.
        """

    def own_memory(self) -> None:
        """Copy what views a tensor that holds several weights, so that the memory of each can be freed by itself."""
