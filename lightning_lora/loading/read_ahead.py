"""Reading in a thread of its own, a bounded number of bytes ahead of whoever works on what was read.

In it torch computes with one thread: a team of threads of its own would spin for a while after each operation, and take
the processor from those that work on what was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch


class Sized(Protocol):
    """Something that takes memory once it is read."""

    @property
    def size(self) -> int:
        """How many bytes."""


Item = TypeVar("Item", bound=Sized)
Value = TypeVar("Value")


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Value], limit: int
) -> Generator[tuple[Item, Value], None, None]:
    """Yield each item with ``read(item)``, in order; a thread reads the next ones meanwhile.

    What is being read, waits, or was yielded last is ``limit`` bytes together at most, or one item that is larger. The
    thread ends with the generator: close it where the loop may be left early.

    Args:
        items: What to read.
        read: Called in the thread; what it raises is raised here.
        limit: In bytes.
    """
    waiting: deque[tuple[Item, Future[Value]]] = deque()
    held, threads = 0, torch.get_num_threads()
    with ThreadPoolExecutor(1, "lightning_lora-read", torch.set_num_threads, (1,)) as thread:
        try:
            for item in items:
                while waiting and held + item.size > limit:
                    first, value = waiting.popleft()
                    yield first, value.result()
                    held -= first.size
                    del value  # it holds what was read
                waiting.append((item, thread.submit(read, item)))
                held += item.size
            while waiting:
                first, value = waiting.popleft()
                yield first, value.result()
                del value
        finally:
            for _, value in waiting:
                value.cancel()
            torch.set_num_threads(threads)  # what threads that start from now on begin with
