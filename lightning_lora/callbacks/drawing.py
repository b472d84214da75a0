"""A few batches of the run's own training loader, as the run itself will get them, and without a trace of it.

What is iterated over is a copy: the shuffle, a generator, the workers and the place of the run's loader stay as they
are. Datasets with a length are not copied, their items are only read; iterable ones are, for iterating moves them on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Dataset, IterableDataset

from lightning_lora.callbacks.processes import gather
from lightning_lora.errors import UnsupportedError


def draw(trainer: Trainer, count: int, *, asked: str, instead: str) -> Iterator[Any]:
    """Yield up to ``count`` training batches, on the device and through the hooks of the module and the datamodule.

    All processes have to iterate together; they get equally many, each from its own loader.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        count: How many at most; one pass over the loader is the limit.
        asked: What needs them, for people.
        instead: What to do where there are none.

    Raises:
        UnsupportedError: If the loader can be passed once only, or not be copied.
    """
    # Lightning says in no public place what was passed to fit, before it has made iterators of it.
    loader = trainer.fit_loop._data_source.dataloader()
    for batch, *_ in _together(islice(_own(loader, asked, instead), count)):
        yield _moved(trainer, batch)


def is_as_it_will_be(trainer: Trainer) -> bool:
    """Whether the module has the dtype it will have in training already: Lightning casts it later than we start."""
    dtype = next((p.dtype for p in trainer.lightning_module.parameters() if p.is_floating_point()), torch.float32)
    probe: torch.Tensor = trainer.precision_plugin.convert_input(torch.zeros((), dtype=dtype))
    return probe.dtype == dtype


def _moved(trainer: Trainer, batch: Any) -> Any:
    """What Lightning does with a batch between the loader and ``training_step``."""
    if is_as_it_will_be(trainer):
        batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _together(items: Iterator[Any]) -> Iterator[Any]:
    """Yield until one process has no more."""
    end = object()
    while True:
        item = next(items, end)
        if any(gather(item is end)):
            return
        yield item


def _own(loader: Any, asked: str, instead: str) -> CombinedLoader:
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    memo: dict[int, Any] = {id(combined._iterator): None}
    for part in combined.flattened:
        if isinstance(part, Iterator):
            raise UnsupportedError(
                f"{asked} reads a few batches before training, and the training loader is a {type(part).__name__} "
                f"that gives each batch once: training would miss them. {instead}"
            )
        if isinstance(part, list | tuple):
            memo[id(part)] = part
        memo |= _kept(part)
    try:
        return copy.deepcopy(combined, memo)
    except TypeError as error:
        raise UnsupportedError(
            f"{asked} reads a few batches before training from a copy of the training loader, which cannot be "
            f"copied: {error}. {instead}"
        ) from error


def _kept(loader: Any) -> dict[int, Any]:
    """What a copy of a loader shares with it, or leaves out: datasets with a length, and the workers of an epoch."""
    held = vars(loader) if hasattr(loader, "__dict__") else {}
    datasets = [value for name, value in held.items() if name == "dataset" or isinstance(value, Dataset)]
    shared = {id(value): value for value in datasets if not isinstance(value, IterableDataset)}
    return shared | {id(held.get("_iterator")): None}
