"""Timing several contenders fairly on a machine that does other things too.

In each round every contender runs once, and each round starts with another one. What slows the machine for a while
then slows all of them, and the ratio within a round hardly moves.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 3
"""Rounds not counted: allocator, thread pool and the kernels' own caches fill in them."""


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, by ``clock``, from the end of the warm-up on."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(-warm_up, rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                elapsed = _seconds(contenders[name], clock)
                if index >= 0:
                    seconds[name].append(elapsed)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
