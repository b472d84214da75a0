"""Tasks in threads: all are run, nothing that goes wrong is lost, and torch is left as it was."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from lightning_lora.io.workers import run


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_all_tasks_are_run_once(at_once):
    found: list[int] = []
    run((partial(found.append, number) for number in range(20)), at_once=at_once)
    assert sorted(found) == list(range(20))


def test_one_at_a_time_is_in_order_and_in_no_other_thread():
    found: list[tuple[int, int]] = []
    run((lambda n=n: found.append((n, threading.get_ident())) for n in range(5)), at_once=1)
    assert found == [(n, threading.get_ident()) for n in range(5)]


def test_two_at_a_time_wait_for_each_other_and_share_torchs_threads(four_threads):
    meeting, found = threading.Barrier(2, timeout=10), []

    def meet() -> None:
        meeting.wait()
        found.append(torch.get_num_threads())

    run([meet, meet], at_once=2)
    assert found == [2, 2]
    assert torch.get_num_threads() == 4
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


def test_after_an_error_no_task_begins_those_that_have_begun_are_waited_for_and_it_is_raised():
    began, failed, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        began.set()
        assert failed.wait(10)
        ended.append("slow")

    def broken() -> None:
        assert began.wait(10)
        threading.Timer(0.1, failed.set).start()
        raise OSError(5, "Input/output error")

    never = [partial(ended.append, "never")] * 50
    with pytest.raises(OSError, match="Input/output"):
        run([slow, broken, partial(failed.wait, 10), *never], at_once=2)
    assert ended[0] == "slow"
    assert len(ended) < 10


def test_no_thread_is_left():
    before = threading.active_count()
    run([int, int, int], at_once=2)
    assert threading.active_count() == before
