"""Writing in a second thread while the next thing to write is made; files and computations let go of Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from typing_extensions import Self


class WriteBehind:
    """One thread that writes, within a ``with`` block. Nothing queues up: memory is that of two things, never of three.

    What is raised in the thread is raised again by the next :meth:`put`, :meth:`wait` or the end of the block.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning_lora-writes")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until all is written; what was raised in the block goes before what was raised in the thread."""
        self._thread.shutdown()
        if error is None:
            self.wait()

    def put(self, write: Callable[[], None]) -> None:
        """Let the thread call ``write`` once it has done what was put before, and wait for that."""
        self.wait()
        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Return once all that was put is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
