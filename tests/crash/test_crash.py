"""A save that dies leaves the version before or the one it was writing: a few trials, all of them are in a script."""

from __future__ import annotations

import random
import sys

import pytest

from tests.crash import kills, syscalls
from tests.crash.layouts import layouts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and traces processes as Linux does")

EVERY = 10
KILLS = 3


@pytest.fixture(scope="module")
def three():
    _, changing, checkpoint, _, shards, _ = layouts()
    return changing, checkpoint, shards


@pytest.mark.skipif(syscalls.why_not() is not None, reason=str(syscalls.why_not()))
def test_a_crash_at_a_system_call_leaves_the_old_version_or_the_new(three):
    for layout in three:
        faults = list(syscalls.faults(syscalls.calls_of(layout)))
        renames = [fault for fault in faults if fault.call.startswith("rename")]
        assert renames, layout.name
        for fault in dict.fromkeys([*renames, *faults[::EVERY]]):
            outcome = syscalls.trial(layout, fault)
            assert outcome in ("old", "new"), f"{layout.name}, {fault}: {outcome}"


def test_a_kill_at_a_random_moment_leaves_the_last_version_or_the_next(three):
    for layout in three:
        longest, draw = kills.longest_of(layout), random.Random(layout.name)
        for _ in range(KILLS):
            outcome = kills.trial(layout, draw, longest)
            assert outcome in ("finished", "next"), f"{layout.name}: {outcome}"
