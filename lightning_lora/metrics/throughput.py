"""Tokens per second, and what counts as a token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

Where = str | int | None
"""Where the tokens of a batch are: a key, a position, or None to look for them."""


def count_tokens(batch: Any, where: Where = None) -> int | Tensor | None:
    """Count the tokens of a batch, padding left out where a mask tells it.

    With ``where=None``: the elements of ``input_ids`` if the batch has that, where ``attention_mask`` is not zero if it
    has that too; else the elements of the first tensor of integers with two axes or more. Labels of a classification,
    which have one axis, are no tokens.

    Args:
        batch: What the loader gives: a tensor, or mappings and sequences of them.
        where: Key or position of the tensor whose elements are tokens; of one whose key ends in ``mask`` the elements
            that are not zero are.

    Returns:
        The number, as a tensor on the batch's device where a mask is counted; None if nothing was found.

    Raises:
        ValueError: If there is no tensor where it was said to be.

    Example:
        >>> count_tokens({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}).item()
        2
    """
    if where is not None:
        return _count(_named(batch, where), masks=str(where).endswith("mask"))
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        return _count(mask, masks=True) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
    found = next((t for t in _tensors(batch) if t.dim() > 1 and _holds_integers(t)), None)
    return None if found is None else found.numel()


class Throughput(Metric):
    """Tokens per second: those of all processes, over the time of the slowest."""

    full_state_update = False
    tokens: Tensor
    seconds: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("tokens", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seconds", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, tokens: int | Tensor, seconds: float) -> None:
        """Take in the tokens of a batch and the time it took."""
        self.tokens += tokens
        self.seconds += seconds

    def compute(self) -> Tensor:
        """Return the rate."""
        return self.tokens / self.seconds


class Stopwatch:
    """Seconds that have gone by while it ran."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Run, if it does not yet."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Hold."""
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """What it shows."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)


def _count(tensor: Tensor, *, masks: bool) -> int | Tensor:
    return torch.count_nonzero(tensor) if masks else tensor.numel()


def _named(batch: Any, where: str | int) -> Tensor:
    parts = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(_as_sequence(batch)))
    found = parts.get(where)
    if not isinstance(found, Tensor):
        has = ", ".join(f"{key!r}: {type(part).__name__}" for key, part in parts.items())
        raise ValueError(f"tokens={where!r} names no tensor of the batch, a {type(batch).__name__} with {has}")
    return found


def _as_sequence(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, Sequence) else (batch,)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _tensors(value)


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
