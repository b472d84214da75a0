"""Writing files that are complete or absent, and clearing away what a killed process has left of one."""

from __future__ import annotations

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

_PREFIX = ".lightning_lora-"
_SUFFIX = ".tmp"
_ABANDONED_AFTER = 24 * 3600.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends well, that file takes the place of ``path`` in one step.

    A crash at any moment leaves the old file or the new one, never a part. The temporary file lies beside the target (a
    rename is atomic only within a filesystem), is flushed to disk before the rename, and gets the mode the user's umask
    gives. Temporary files that processes now dead have left in that folder are deleted first.

    Raises:
        OSError: If the file cannot be written; the old one is untouched and no temporary file remains.
    """
    with replacing_all([path]) as (temporary,):
        yield temporary


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The same for several files: all are on disk before the first takes its place, and they do so in this order.

    Each step is atomic, all together are not: what is read first has to say what the rest has to be.

    Raises:
        OSError: If a file cannot be written; all old ones are untouched, unless a rename itself fails.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        sweep(folder)
    temporaries: list[Path] = []
    try:
        for path in paths:
            temporaries.append(_temporary(path))
            _create(temporaries[-1], path)
        modes = [temporary.stat().st_mode for temporary in temporaries]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            temporary.chmod(mode)  # safetensors writes with mode 0600 whatever the umask (safetensors issue 782)
            _sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
            _sync(path.parent)  # after each: renames may reach the disk in another order
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Delete the temporary files in ``folder`` that no process is writing any more.

    Of this machine those whose process is dead; of others (on a shared filesystem) those that a day has not touched.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another process may be sweeping too
            if _is_abandoned(path):
                path.unlink()


def _temporary(path: Path) -> Path:
    """A new name beside ``path``; not made of that of the target, which may be as long as names can be."""
    return path.with_name(f"{_PREFIX}{_machine()}-{os.getpid()}-{uuid.uuid4().hex}{_SUFFIX}")


def _create(temporary: Path, path: Path) -> None:
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _is_abandoned(path: Path) -> bool:
    machine, _, rest = path.name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if os.name == "posix" and machine == _machine() and pid.isdigit():
        return not _is_alive(int(pid))
    return time.time() - path.stat().st_mtime > _ABANDONED_AFTER


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


@lru_cache(maxsize=1)
def _machine() -> str:
    """Where process ids count: this boot of this machine, and in containers this one."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def _sync(path: Path) -> None:
    """Force a file, or the entry of a renamed one in its folder, to disk; Windows cannot sync a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
