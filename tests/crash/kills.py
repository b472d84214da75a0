"""Kill -9 at random moments while a process saves one version after another in the same place.

The process tells through a pipe which version it has finished. What a reader finds after the kill has to be that one or
the next, whole.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import tempfile
import time
from pathlib import Path

from tests.crash.layouts import Layout

VERSIONS = 6


def trial(layout: Layout, draw: random.Random, longest: float) -> str:
    """Kill one process and say what a reader finds: ``"finished"``, ``"next"``, or what is wrong, in capitals."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        layout.write(folder, 0)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _save_forever(layout, folder, writing)
        os.close(writing)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = [number for (number,) in struct.iter_unpack("i", pipe.read())]
        finished = told[-1] if told else 0
        if finished < 0:
            return "THE SAVE FAILED"
        try:
            found = layout.read(folder)
        except Exception as error:
            return f"NOTHING LOADS: {type(error).__name__}: {error}"
        for name, version in (("finished", finished), ("next", finished + 1)):
            if layout.is_version(found, version % VERSIONS):
                return name
        return "TORN OR LOST"


def longest_of(layout: Layout) -> float:
    """Three saves and some: how long to wait at most before the kill."""
    with tempfile.TemporaryDirectory() as place:
        for version in range(VERSIONS):
            layout.expected(version)
        began = time.perf_counter()
        for version in range(3):
            layout.write(Path(place), version)
        return 1.2 * (time.perf_counter() - began)


def _save_forever(layout: Layout, folder: Path, pipe: int) -> None:
    number = 0
    try:
        while True:
            number += 1
            layout.write(folder, number % VERSIONS)
            os.write(pipe, struct.pack("i", number))
    except BaseException:
        os.write(pipe, struct.pack("i", -1))
    finally:
        os._exit(1)
