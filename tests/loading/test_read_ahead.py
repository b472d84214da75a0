"""Reading ahead keeps the order, keeps to its limit, and ends with whoever reads."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch

from lightning_lora.loading.read_ahead import read_ahead


@dataclass(frozen=True)
class Sized:
    name: int
    size: int


def test_items_come_in_order_with_what_was_read():
    items = [Sized(index, size) for index, size in enumerate([3, 1, 9, 0, 2, 5])]
    assert list(read_ahead(items, lambda item: item.name**2, 4)) == [(item, item.name**2) for item in items]


@pytest.mark.parametrize("limit", [1, 4, 7, 100])
def test_no_more_than_the_limit_or_one_larger_item_is_held(limit):
    sizes = [3, 1, 9, 0, 2, 5, 4, 4, 1, 1, 1, 8]
    begun: list[int] = []
    released = 0
    for item, _ in read_ahead([Sized(i, s) for i, s in enumerate(sizes)], lambda i: begun.append(i.size), limit):
        held = sum(begun) - released
        assert held <= max(limit, item.size)
        released += item.size


def test_the_next_item_is_read_while_the_last_is_worked_on():
    second = threading.Event()

    def read(item: Sized) -> None:
        if item.name == 1:
            second.set()

    for item, _ in read_ahead([Sized(0, 1), Sized(1, 1), Sized(2, 1)], read, 10):
        assert item.name or second.wait(30)


def test_what_the_reading_raises_is_raised():
    def read(item: Sized) -> None:
        if item.name == 1:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(read_ahead([Sized(0, 1), Sized(1, 1), Sized(2, 1)], read, 10))


def test_leaving_early_ends_the_thread_without_reading_the_rest():
    read: list[int] = []
    before = set(threading.enumerate())
    with closing(read_ahead([Sized(i, 1) for i in range(100)], lambda i: read.append(i.name), 2)) as items:
        next(items)
    assert set(threading.enumerate()) == before
    assert len(read) <= 3


def test_reading_computes_with_one_thread_and_leaves_torchs_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = [seen for _, seen in read_ahead([Sized(0, 1), Sized(1, 1)], lambda _: torch.get_num_threads(), 10)]
        here = torch.get_num_threads()
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (found, here, later) == ([1, 1], 3, [3])
    finally:
        torch.set_num_threads(before)
