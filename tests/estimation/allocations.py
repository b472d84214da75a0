"""What PyTorch's CPU allocator gives out, as its profiler reports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType


@dataclass(frozen=True)
class Allocations:
    """Bytes beyond those from before: the most at once, and those that are still there at the end."""

    peak: int
    kept: int


def allocations(act: Callable[[], object]) -> Allocations:
    """Return what was allocated while ``act`` ran.

    Memory from before that is given back meanwhile is not noticed.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    results = profile.profiler.kineto_results
    changes = sorted(
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _all(results.experimental_event_tree())
        if event.tag == _EventType.Allocation
    )
    now = most = 0
    mine: set[int] = set()
    for _, pointer, size in changes:
        if size > 0:
            mine.add(pointer)
        elif pointer not in mine:  # garbage from before
            continue
        now += size
        most = max(most, now)
    return Allocations(peak=most, kept=now)


def peak_allocations(act: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once while ``act`` ran, beyond those from before it."""
    return allocations(act).peak


def _all(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)
