"""Files are complete or absent, whatever happens to the process or the disk, and nothing is left lying about."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from lightning_lora.io import atomic
from lightning_lora.io.atomic import replacing

KILLED = """
import os, runpy, signal, sys
from pathlib import Path
replacing = runpy.run_path(sys.argv[2])["replacing"]  # the file alone: the package imports Lightning
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the ne")
    {end}
"""


def in_another_process(path, end: str) -> subprocess.Popen[str]:
    code = KILLED.format(end=end)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, path, atomic.__file__], stdin=pipe, stdout=pipe, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_a_killed_process_leaves_the_old_file_and_the_next_save_sweeps_its_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with in_another_process(path, "os.kill(os.getpid(), signal.SIGKILL)") as other:
        assert other.wait() == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="process ids tell only on POSIX")
def test_what_a_living_process_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "file"
    with in_another_process(path, "print('here', flush=True); sys.stdin.read()") as other:
        assert other.stdout.readline() == "here\n"
        with replacing(path) as temporary:
            temporary.write_text("mine")
        assert len(list(tmp_path.iterdir())) == 2


def test_of_another_machine_only_what_a_day_has_not_touched_is_swept(tmp_path):
    for name in ("young", "old"):
        (tmp_path / f".lightning_lora-0badcafe-1-{name}.tmp").write_text("x")
    long_ago = time.time() - 25 * 3600
    os.utime(tmp_path / ".lightning_lora-0badcafe-1-old.tmp", (long_ago, long_ago))
    (tmp_path / "mine.tmp").write_text("x")
    atomic.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lightning_lora-0badcafe-1-young.tmp", "mine.tmp"]


def test_the_file_is_on_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("tells files from folders by /proc")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert order[0] == "file"
    assert order[-1] == "folder"


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_the_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError, match="absent/file'") as error, replacing(tmp_path / "absent" / "file"):
        pass
    assert "lightning_lora-" not in str(error.value)
