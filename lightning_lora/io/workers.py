"""Tasks in several threads at a time; computations and files let go of Python's lock.

The threads that torch divides an operation among meet at its end, and all wait for one that was interrupted, as by
writing a file. So here each task is one thread's from its beginning to its end, and torch's threads are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

Task = Callable[[], object]


def run(tasks: Iterable[Task], *, at_once: int) -> None:
    """Run all tasks, so many of them at a time; one at a time is here and in order.

    Once a task has failed no other begins, and those that have begun are waited for.

    Args:
        tasks: What to run.
        at_once: How many threads.

    Raises:
        BaseException: What a task raised; of several that failed, the first.
    """
    if at_once == 1:
        for task in tasks:
            task()
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # streams belong to threads, and these would not wait for what this one has begun
    threads = torch.get_num_threads()
    each = max(1, threads // at_once)
    try:
        with ThreadPoolExecutor(at_once, "lightning_lora", torch.set_num_threads, (each,)) as pool:
            started = [pool.submit(task) for task in tasks]
            try:
                wait(started, return_when=FIRST_EXCEPTION)
            finally:
                for future in started:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what threads that start from now on begin with
    for future in started:
        if not future.cancelled():
            future.result()
