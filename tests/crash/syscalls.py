"""Crash at every system call of a save: SIGKILL, and a full disk, at each one that changes something on disk.

A process that has everything imported forks for each trial. The child waits until strace is attached to it, saves a
second version over a first, and meets the fault at the n-th call. Whatever happens, one of the two versions has to be
there for a reader, whole; an error must be one of ours or an ``OSError`` and leave no temporary file; and the next save
must succeed and sweep what a kill has left.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_lora import LoRAError
from tests.crash.layouts import Layout

WRITING = ("write", "pwrite64", "fsync", "rename", "renameat", "renameat2")
KILLED_AT = (*WRITING, "openat", "unlink", "unlinkat", "chmod", "fchmodat", "mkdir")
DONE, REFUSED, OTHER = 0, 3, 4
_PR_SET_PTRACER = 0x59616D61
_SECONDS = 60


@dataclass(frozen=True)
class Fault:
    """What strace does to the child.

    Attributes:
        call: Name of the system call.
        number: At the how many-th of them.
        what: ``"SIGKILL"`` or ``"ENOSPC"``.
        in_worker: Whether the call is one of a thread that writes; strace counts those of each for itself.
    """

    call: str
    number: int
    what: str
    in_worker: bool = False

    @property
    def option(self) -> str:
        """As strace's ``inject`` wants it."""
        how = "signal=SIGKILL" if self.what == "SIGKILL" else f"error={self.what}"
        return f"inject={self.call}:{how}:when={self.number}"


def why_not() -> str | None:
    """Say why faults cannot be injected here, or return None where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed (Debian: apt-get install strace)"
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"strace may not trace here: {probe.stderr.strip()[:200]}"


def calls_of(layout: Layout) -> Counter[tuple[str, bool]]:
    """How many of each call one save makes, in the thread that saves and in all of those that write for it."""
    with tempfile.TemporaryDirectory() as place:
        layout.write(Path(place), 0)
        log = Path(place) / "strace.log"
        status = _saved(
            layout, Path(place), ["-f", "-e", f"trace={','.join(f'?{call}' for call in KILLED_AT)}", "-o", str(log)]
        )
        assert status == DONE, status
        found = re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE)
        saving = next(thread for thread, call in found if call != "write")  # creates the files before any is written
        return Counter((call, thread != saving) for thread, call in found)


def faults(calls: Counter[tuple[str, bool]]) -> Iterator[Fault]:
    """Every fault that a save can meet, and some that no worker gets to where several share the calls."""
    for call, in_worker in itertools.product(KILLED_AT, (False, True)):
        for number in range(1, calls[call, in_worker] + 1):
            yield Fault(call, number, "SIGKILL", in_worker)
            if call in WRITING:
                yield Fault(call, number, "ENOSPC", in_worker)


def trial(layout: Layout, fault: Fault) -> str:
    """Save once under a fault and say what a reader finds: ``"old"``, ``"new"``, or what is wrong, in capitals."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        layout.write(folder, 0)
        follow = ["-f"] * fault.in_worker  # else strace stays with the thread it is attached to
        status = _saved(layout, folder, [*follow, "-e", f"trace={fault.call}", "-e", fault.option, "-o", os.devnull])
        if status not in (DONE, REFUSED, -signal.SIGKILL):
            return f"WRONG END {status}"
        try:
            found = layout.read(folder)
        except Exception as error:
            return f"NOTHING LOADS: {type(error).__name__}: {error}"
        outcome = next(
            (name for version, name in enumerate(("old", "new")) if layout.is_version(found, version)), "TORN"
        )
        if (status == DONE and outcome == "old") or (status != -signal.SIGKILL and _litter(folder)):
            return f"LITTER OR LOSS: {status} {outcome} {_litter(folder)}"
        layout.write(folder, 2)
        if _litter(folder) or not layout.is_version(layout.read(folder), 2):
            return f"THE NEXT SAVE FAILS: {_litter(folder)}"
        return outcome


def _saved(layout: Layout, folder: Path, options: list[str]) -> int:
    """Save version 1 in a child under strace; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        _child(layout, folder)
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-p", str(child), *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert "attached" in said, said
    os.kill(child, signal.SIGCONT)
    _, status = os.waitpid(child, 0)
    tracer.wait(_SECONDS)
    tracer.stderr.close()
    return os.waitstatus_to_exitcode(status)


def _child(layout: Layout, folder: Path) -> None:
    code = OTHER
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # for Yama, where nobody is root
        os.kill(os.getpid(), signal.SIGSTOP)
        signal.alarm(_SECONDS)
        layout.write(folder, 1)
        code = DONE
    except (LoRAError, OSError):
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".lightning_lora-*")]
