"""Writing files that are complete or absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends well, that file takes the place of ``path`` in one step.

    A crash at any moment leaves the old file or the new one, never a part. The temporary file lies beside the target (a
    rename is atomic only within a filesystem), is flushed to disk before the rename, and gets the mode the user's umask
    gives.

    Raises:
        OSError: If the file cannot be written; the old one is untouched and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors writes with mode 0600 whatever the umask (safetensors issue 782)
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Force a file, or the entry of a renamed one in its folder, to disk; Windows cannot sync a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
