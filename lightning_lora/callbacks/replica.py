"""A copy of a module in a run, for steps that are to leave no trace: what they count, log or keep is the copy's."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.base import QuantizedLinear


def silent_copy(module: LightningModule, trainer: Trainer, *, asked: str, instead: str) -> LightningModule:
    """Return a copy that shares weights, Trainer and data, and logs nothing.

    Args:
        module: Stays as it is.
        trainer: The one it is in.
        asked: What needs the copy, for people.
        instead: What to do where there is none.

    Raises:
        UnsupportedError: If it cannot be copied.
    """
    parameters: list[object] = list(module.parameters())
    for child in module.modules():
        parameters += child.buffers() if isinstance(child, QuantizedLinear) else ()
    try:
        replica = copy.deepcopy(module, {id(item): item for item in [*shared(module, trainer), *parameters]})
    except (TypeError, RuntimeError) as error:
        raise UnsupportedError(
            f"{asked} runs training batches through a copy of the module, and {type(module).__name__} cannot be "
            f"copied: {error}. {instead}"
        ) from error
    if replica._compiler_ctx is not None:  # the compiled functions are those of the module it was copied from
        replica = to_uncompiled(replica)
    replica.trainer = trainer
    for child in replica.modules():
        if isinstance(child, LightningModule):
            child.log = child.log_dict = _nothing  # type: ignore[method-assign]
    return replica


def shared(module: nn.Module, trainer: Trainer) -> list[object]:
    """What no copy of a module takes along: the Trainer, and data."""
    kept: list[object] = [trainer]
    for child in module.modules():
        kept += [value for value in vars(child).values() if isinstance(value, Dataset | DataLoader)]
    return kept


def _nothing(*_: Any, **__: Any) -> None:
    pass
