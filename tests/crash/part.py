"""A few of the trials that ``tests/benchmarks/integrity.py`` makes all of, in a process of its own.

It forks, which a process with threads should not.

    python -m tests.crash.part calls|kills
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

from tests.crash import kills, syscalls
from tests.crash.layouts import Layout, layouts

EVERY = 10
KILLS = 3


def at_calls(layout: Layout) -> Iterator[str]:
    """Crash at each rename, and at some of the other calls."""
    faults = list(syscalls.faults(syscalls.calls_of(layout)))
    renames = [fault for fault in faults if fault.call.startswith("rename")]
    if not renames:
        yield f"{layout.name}: no rename seen"
    for fault in dict.fromkeys([*renames, *faults[::EVERY]]):
        outcome = syscalls.trial(layout, fault)
        if outcome not in ("old", "new"):
            yield f"{layout.name}, {fault}: {outcome}"


def at_random(layout: Layout) -> Iterator[str]:
    """Kill at random moments."""
    longest, draw = kills.longest_of(layout), random.Random(layout.name)
    for _ in range(KILLS):
        outcome = kills.trial(layout, draw, longest)
        if outcome not in ("finished", "next"):
            yield f"{layout.name}: {outcome}"


def main() -> int:
    """Print what went wrong; 0 if nothing did."""
    which = {"calls": at_calls, "kills": at_random}[sys.argv[1]]
    _, changing, checkpoint, _, shards, _ = layouts()
    wrong = [line for layout in (changing, checkpoint, shards) for line in which(layout)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
