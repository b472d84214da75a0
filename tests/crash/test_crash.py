"""A save that dies leaves the version before or the one it was writing: a few trials, all of them are in a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash import syscalls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and traces processes as Linux does")
ROOT = Path(__file__).parents[2]


def run(which: str) -> None:
    command = [sys.executable, "-m", "tests.crash.part", which]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.skipif(syscalls.why_not() is not None, reason=str(syscalls.why_not()))
def test_a_crash_at_a_system_call_leaves_the_old_version_or_the_new():
    run("calls")


def test_a_kill_at_a_random_moment_leaves_the_last_version_or_the_next():
    run("kills")
