"""Where in a run a checkpoint stands, and how Lightning is brought to go on from exactly there.

Lightning goes on well from most places, from three it does not (2.6.6): a checkpoint written at the end of the batch
after which validation follows loses the validation; one written at the end of an epoch does not give a stateful loader
its state back, so the shuffle starts anew; and one written at the end of an epoch's last batch loses the whole next
epoch with such a loader. Here the progress in the checkpoint is brought to a neighbouring place that Lightning handles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Place:
    """Where a checkpoint stands.

    Attributes:
        epoch_over: Whether the next batch is the first of a new epoch, with nothing left to do in the old one.
        inside_epoch: Whether batches of the epoch have been trained and others have not.
        inside_batch: Whether it was written while a batch was being trained, as after an exception.
    """

    epoch_over: bool = False
    inside_epoch: bool = False
    inside_batch: bool = False


def validation_follows(trainer: Trainer) -> bool:
    """Whether validation comes next, when a batch has just been trained."""
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    every = trainer.val_check_batch
    if every is None:  # by time; whether it is due then cannot be told now
        return False
    if every == float("inf"):
        return loop.batch_progress.is_last_batch
    batch = loop.total_batch_idx if epochs is None else loop.batch_idx
    return (batch + 1) % every == 0


def settle(loops: dict[str, Any], *, validation_due: bool) -> Place:
    """Find where a checkpoint stands, and change the progress in it where Lightning would not go on from there.

    Args:
        loops: What the checkpoint says of ``fit_loop``; changed in place.
        validation_due: Whether validation was to follow the batch, if it was written at the end of a batch.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    batch, epoch = batches["current"], epochs["current"]
    at_batch_end = batch["completed"] < batch["processed"] == batch["ready"]
    if at_batch_end and validation_due:
        _complete(batches)
        _begin(loops["epoch_loop.val_loop.batch_progress"])
        return Place(inside_epoch=not batches["is_last_batch"])
    trained = at_batch_end and batches["is_last_batch"]
    if trained or (epoch["processed"] == epoch["started"] and batch["ready"] > 0):
        if trained:  # what Lightning does once validation is over
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        _complete(batches)
        batches["current"] = dict.fromkeys(batch, 0)
        batches["is_last_batch"] = False
        for progress in (epochs["total"], epochs["current"]):
            progress.update(dict.fromkeys(progress, progress["started"]))
        return Place(epoch_over=True)
    return Place(
        inside_epoch=batch["ready"] > 0 and not batches["is_last_batch"],
        inside_batch=batch["processed"] < batch["ready"],
    )


def _complete(batches: dict[str, Any]) -> None:
    for progress in (batches["total"], batches["current"]):
        progress["completed"] = progress["processed"]


def _begin(validation: dict[str, Any]) -> None:
    """Mark a validation as begun and nothing of it done: Lightning then runs it from its start."""
    validation["total"]["ready"] += 1
    validation["total"]["started"] += 1
    validation["current"] = dict.fromkeys(validation["current"], 0)
