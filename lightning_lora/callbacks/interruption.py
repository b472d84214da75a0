"""A run that is told to stop (SIGTERM: a cluster's time limit, a preempted machine) keeps what it has learnt.

Lightning ends such a run by an exception that is a ``SystemExit`` without a code: nothing is saved unless a callback
was asked to, and the process reports success.
"""

from __future__ import annotations

import signal
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

FILE_NAME = "interrupted.ckpt"


def keep_interrupted_run(trainer: Trainer, exception: BaseException) -> None:
    """After SIGTERM, write a checkpoint beside the others, unless one is being written, and exit with 128 + 15.

    Nothing is written where the user wants no checkpoints (``enable_checkpointing=False``, ``fast_dev_run``,
    ``barebones``).
    """
    if not isinstance(exception, SIGTERMException):
        return
    exception.code = 128 + signal.SIGTERM
    writers = trainer.checkpoint_callbacks
    if trainer.state.fn != "fit" or not writers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if any(
        isinstance(w, OnExceptionCheckpoint) or (isinstance(w, ModelCheckpoint) and w.save_on_exception)
        for w in writers
    ):
        return
    folder = getattr(writers[0], "dirpath", None) or trainer.default_root_dir
    path = Path(folder) / FILE_NAME
    trainer.save_checkpoint(path)
    rank_zero_info(f"LoRA: stopped by SIGTERM after step {trainer.global_step}. Go on with ckpt_path={str(path)!r}")
