"""Writing behind: in order, bounded, and nothing that goes wrong in the thread is lost."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_lora.io import behind
from lightning_lora.io.behind import WriteBehind


class Slow(io.FileIO):
    """A file that keeps each write until it is let go, and takes a part of what it is given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.go, self.began = threading.Event(), threading.Event()

    def write(self, data: memoryview) -> int:
        self.began.set()
        assert self.go.wait(10)
        return super().write(data[:3])


@pytest.fixture
def file(tmp_path) -> Iterator[Slow]:
    with Slow(tmp_path / "file") as opened:
        yield opened


class Broken(io.RawIOBase):
    """A file on a disk that fails."""

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def write(self, data: memoryview) -> int:
        raise OSError(5, "Input/output error")


def piece(text: bytes) -> memoryview:
    return memoryview(text)


def test_what_is_put_lands_where_it_was_meant_to_by_the_end_of_the_block(file):
    file.go.set()
    with WriteBehind() as writes:
        writes.put(file, 8, piece(b"second one"))
        writes.put(file, 0, piece(b"first"))
    assert Path(file.name).read_bytes() == b"first\0\0\0second one"


def test_put_waits_while_more_would_wait_than_is_allowed(file, monkeypatch):
    monkeypatch.setattr(behind, "_WAITING", 8)
    with WriteBehind() as writes:
        writes.put(file, 0, piece(b"twelve bytes"))  # alone it may be larger
        assert file.began.wait(10)
        full = threading.Thread(target=writes.put, args=(file, 12, piece(b"x")))
        full.start()
        full.join(0.05)
        assert full.is_alive()
        file.go.set()
        full.join(10)
        assert not full.is_alive()


def test_what_is_raised_in_the_thread_is_raised_at_the_end():
    with pytest.raises(OSError, match="Input/output"), WriteBehind() as writes:
        writes.put(Broken(), 0, piece(b"x"))


def test_what_is_raised_in_the_block_goes_first_and_drops_what_waits(file):
    def fail() -> None:
        with WriteBehind() as writes:
            writes.put(file, 0, piece(b"abc"))
            writes.put(file, 3, piece(b"def"))
            assert file.began.wait(10)
            threading.Timer(0.05, file.go.set).start()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert Path(file.name).read_bytes() == b"abc"


def test_no_thread_is_left(file):
    before = threading.active_count()
    with WriteBehind() as writes:
        writes.put(file, 0, piece(b""))
    assert threading.active_count() == before
