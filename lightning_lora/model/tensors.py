"""All that a module holds, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of ``module``."""
    yield from module.parameters()
    yield from module.buffers()


def size_in_bytes(held: Iterable[Tensor]) -> int:
    """Return the bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
