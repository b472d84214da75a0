"""Writing in a second thread while the next thing to write is made; files and computations let go of Python's lock.

On Linux the disk is set to work as data comes, so that little is left for the ``fsync`` at the end.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from types import TracebackType

from typing_extensions import Self

_WAITING = 2**25


class WriteBehind:
    """One thread that writes, within a ``with`` block, while little is waiting: 32 MB, or one thing that is larger.

    What is raised in the thread is raised again by the next :meth:`put`, :meth:`wait` or the end of the block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_lora-writes")
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until all is written; what was raised in the block goes before what was raised in the thread."""
        self._thread.shutdown(cancel_futures=error is not None)
        if error is None:
            self.wait()

    def put(self, file: RawIOBase, offset: int, data: memoryview) -> None:
        """Let the thread write ``data`` at ``offset``, and wait until there is room for it."""
        while self._waiting and sum(size for _, size in self._waiting) + len(data) > _WAITING:
            self._wait_for_one()
        self._waiting.append((self._thread.submit(self._write, file, offset, data), len(data)))

    def wait(self) -> None:
        """Return once all that was put is written."""
        while self._waiting:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        self._waiting.popleft()[0].result()

    def _write(self, file: RawIOBase, offset: int, data: memoryview) -> None:
        size = len(data)
        file.seek(offset)
        while data:  # one call writes 2 GiB at most
            data = data[file.write(data) :]
        if sys.platform == "linux":
            # Starts to write this to disk without waiting, as fsync would, and drops from memory only what is there.
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
