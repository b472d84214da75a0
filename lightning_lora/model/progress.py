"""A progress bar for what takes long: one line, in one process, and only after two seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import torch.distributed as dist
from tqdm import tqdm

Item = TypeVar("Item")

DELAY = 2.0
"""Seconds of work before the bar appears."""


def progress(items: Collection[Item] | Iterable[Item], what: str) -> Iterator[Item]:
    """Yield the items, with a bar called ``what`` if that takes long and this is the first process."""
    first = not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
    yield from tqdm(items, desc=f"LoRA: {what}", delay=DELAY, disable=not first, leave=False)
