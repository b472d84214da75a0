"""How a run writes its checkpoints: complete or absent, and what becomes of the run when one cannot be written.

Lightning writes to ``$TMPDIR`` and moves the file: across filesystems that is a copy over the last good checkpoint, one
that a full disk or a kill cuts short, and nothing is flushed to disk. Here the temporary file lies beside the target.
"""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.callbacks.wraps import substitute
from lightning_lora.errors import CheckpointError
from lightning_lora.io.atomic import replacing
from lightning_lora.io.checkpoint_file import require_sealed, require_whole
from lightning_lora.io.description import KEY

ON_SAVE_ERROR = ("raise", "warn")

_FIXES = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there, or have the quota raised",
    errno.EACCES: "Make that folder writable, or choose another",
    errno.EPERM: "Make that folder writable, or choose another",
    errno.EROFS: "Choose a folder on a filesystem that can be written",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own reading and writing, but that local files are complete or absent, also after a power cut."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; what is no local path is left to Lightning and the remote store."""
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(LocalFileSystem._strip_protocol(str(path)))
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # not into the file: of a full disk, torch would tell by an internal error
        with replacing(target) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, if it is whole and as it was written.

        Raises:
            CheckpointError: If it is damaged, or a URL: Lightning runs the code in what it fetches.
        """
        if str(path).startswith(("http://", "https://")):
            raise CheckpointError(f"{path} is a URL, and a checkpoint read from one can run code. Download it first")
        if isinstance(get_filesystem(path), LocalFileSystem):
            require_whole(Path(LocalFileSystem._strip_protocol(str(path))))
        checkpoint = super().load_checkpoint(path, *arguments, **options)
        if isinstance(checkpoint.get(KEY), dict):
            require_sealed(checkpoint, path)
        return checkpoint


@dataclass
class Saves:
    """What is known of the checkpoints a strategy has written.

    Attributes:
        on_error: ``"raise"`` or ``"warn"``.
        good: The last one that was written.
        failed: Whether the last attempt failed.
        spared: Older ones that were to be deleted after an attempt that failed.
    """

    on_error: str
    good: str | None = None
    failed: bool = False
    spared: list[Any] = field(default_factory=list)


def guard_saves(strategy: Strategy, before: Callable[[dict[str, Any]], None], on_error: str) -> None:
    """Let every checkpoint of a strategy pass ``before``, be written durably, and fail as ``on_error`` says.

    This stays with the strategy, because ``trainer.save_checkpoint`` may be called after the run. A ``CheckpointIO`` of
    the user's own writes as it does.
    """
    known: Saves | None = getattr(strategy, "_lightning_lora_saves", None)
    if known is not None:
        known.on_error = on_error
        return
    saves = Saves(on_error)
    strategy._lightning_lora_saves = saves  # type: ignore[attr-defined]
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = DurableCheckpointIO()
    remove = strategy.remove_checkpoint
    substitute(strategy, "save_checkpoint", partial(_save, saves, before, strategy.save_checkpoint, remove))
    substitute(strategy, "remove_checkpoint", partial(_remove, saves, remove))


@contextmanager
def told(path: Any, on_error: str, good: str | None = None) -> Iterator[list[OSError]]:
    """Turn a failure to write ``path`` into one error, or one warning, that says what is left and what to do.

    Yields:
        A list that holds the failure after the block, if it was to be a warning.

    Raises:
        CheckpointError: If writing fails and ``on_error`` is ``"raise"``.
    """
    failures: list[OSError] = []
    try:
        yield failures
    except OSError as error:
        text = f"{path} was not written: {_reason(error, Path(path))}. {_left(good)}"
        if on_error == "raise":
            raise CheckpointError(
                f"{text}{_FIXES.get(error.errno or 0, 'Mend that')}. With LoRACallback(on_save_error='warn') training "
                "goes on without"
            ) from error
        failures.append(error)
        rank_zero_warn(f"LoRA: {text}Training goes on. {_FIXES.get(error.errno or 0, 'Mend that')}")


def _save(
    saves: Saves,
    before: Callable[[dict[str, Any]], None],
    save: Callable[..., None],
    remove: Callable[[Any], None],
    checkpoint: dict[str, Any],
    filepath: Any,
    *arguments: Any,
    **options: Any,
) -> None:
    before(checkpoint)
    saves.failed = True
    with told(filepath, saves.on_error, saves.good) as failures:
        save(checkpoint, filepath, *arguments, **options)
    if failures:
        return
    saves.failed, saves.good = False, str(filepath)
    while saves.spared:
        old = saves.spared.pop()
        if str(old) != saves.good:
            remove(old)


def _remove(saves: Saves, remove: Callable[[Any], None], filepath: Any) -> None:
    """Delete a checkpoint, but not the last good one in favour of one that could not be written."""
    if saves.failed:
        saves.spared.append(filepath)
    else:
        remove(filepath)


def _reason(error: OSError, path: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next((parent for parent in path.absolute().parents if parent.exists()), None)
        if folder is not None:
            reason += f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder})"
    return reason


def _left(good: str | None) -> str:
    return f"The last good one is {good}. " if good is not None else "Nothing that was there before has changed. "
