"""What fits into so much memory: the largest batch, the longest sequence, and what to switch on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from lightning_lora.estimation.setup import BLOCKS, Setup

TOKENS = 64
"""Sequences are told in multiples of this."""
MOST = 2**20
"""Sequences and tokens beyond which nothing is looked for."""

Total = Callable[[Setup, int, int], int]
"""Bytes that a setup takes with a batch of so many sequences of so many tokens."""


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        budget: Bytes.
        setup: The setup as asked for, or the first change of it that fits; None where none does.
        changes: What to switch on for that, in the words of :class:`Setup`; empty where it fits as it is.
        batch: The most sequences of the length asked for; 0 where nothing fits.
        seq: The most tokens for the number of sequences asked for, a multiple of ``TOKENS``; 0 where fewer fit.
        total: Bytes that the setup takes as asked for.
    """

    budget: int
    setup: Setup | None
    changes: tuple[str, ...]
    batch: int
    seq: int
    total: int


def fit(total: Total, setup: Setup, budget: int, *, batch: int, seq: int) -> Fit:
    """Say what of a setup fits, or what to change until it does.

    Args:
        total: Tells the bytes.
        setup: As asked for.
        budget: Bytes there are. A context and an allocator take some of a GPU: 24GB leave 1.8 of its 24 GiB to them.
        batch: Sequences asked for.
        seq: Tokens asked for.
    """
    total = cache(total)
    for changed, words in _changes(setup):
        size = total(changed, batch, seq)
        if size <= budget:
            most = largest(lambda n, its=changed: total(its, n, seq), budget, batch)  # type: ignore[misc]
            units = largest(lambda n, its=changed: total(its, batch, n * TOKENS), budget, seq // TOKENS)  # type: ignore[misc]
            return Fit(budget, changed, words, most, units * TOKENS, size)
    return Fit(budget, None, (), 0, 0, total(setup, batch, seq))


def largest(size: Callable[[int], int], budget: int, known: int) -> int:
    """Return the largest ``n`` up to ``MOST`` with ``size(n) <= budget``, for a size that grows with ``n``.

    A line through the last two sizes says where to look next: most sizes lie on one.

    Args:
        size: Bytes.
        budget: Bytes.
        known: Fits, or is 0.
    """
    low, high = known, MOST + 1
    last = size(max(known, 1))
    guess = max(2 * known, 1)
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        now = size(guess)
        slope = max((now - last) / max(guess - max(low, 1), 1), 1) if now > last else 1.0
        line = guess + int((budget - now) // slope)
        if now <= budget:
            low, last = guess, now
            guess = min(max(line, low + 1), 16 * low)
        else:
            high = guess
            guess = line if line > low else (low + high) // 2
    return low


def _changes(setup: Setup) -> Iterator[tuple[Setup, tuple[str, ...]]]:
    """The setup, and changes of it from the cheapest on; each keeps those before it."""
    yield setup, ()
    words: tuple[str, ...] = ()
    if setup.activation_checkpointing is None:
        setup, words = replace(setup, activation_checkpointing=BLOCKS), (*words, "activation checkpointing")
        yield setup, words
    if setup.optimizer != "paged_adamw_8bit":
        setup, words = replace(setup, optimizer="paged_adamw_8bit"), (*words, "optimizer paged_adamw_8bit")
        yield setup, words
    ladder = ("lora", "qlora-8bit", "qlora-4bit", "qlora-3bit", "qlora-2bit")
    rest = ladder[ladder.index(setup.method) + 1 :] if setup.method in ladder else ladder
    for method in rest:
        yield replace(setup, method=method), (*words, f"method {method}")
