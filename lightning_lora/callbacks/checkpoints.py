"""Lightning checkpoints that hold the fine-tune alone: reduced before they are written, completed before they load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.callbacks.averaging import weights_in
from lightning_lora.callbacks.finetune import FineTune
from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.description import differences
from lightning_lora.optim.report import class_name

KEY = "lightning_lora"
"""The checkpoint entry that says what adapter the checkpoint holds."""


def reduce_checkpoint(checkpoint: dict[str, Any], finetune: FineTune, optimizers: Sequence[Optimizer] = ()) -> None:
    """Leave in a checkpoint the weights the fine-tune changes, averages included, and describe it under :data:`KEY`."""
    entry = checkpoint.setdefault(KEY, {})
    if "version" in entry:
        return
    for holder, key in weights_in(checkpoint):
        if holder[key]:  # where weights are gathered from several processes, all but the first hold none
            available = {**finetune.state(), **holder[key]}
            holder[key] = {name: available[name] for name in finetune.keys}
    entry |= finetune.description | {"optimizers": [class_name(optimizer) for optimizer in optimizers]}


def complete_checkpoint(checkpoint: dict[str, Any], finetune: FineTune, module: nn.Module) -> None:
    """Check that a checkpoint belongs to this fine-tune, and add the frozen weights it leaves out.

    They come from ``module`` itself. Lightning can then load it strictly: nothing of ours may be missing, and nothing
    foreign is let in.

    Raises:
        CheckpointError: If it holds no adapter, or another one; the message names both sides.
    """
    check_belongs(checkpoint, finetune)
    frozen: dict[str, Tensor] = module.state_dict()
    for holder, key in weights_in(checkpoint):
        check_keys(holder[key], finetune)
        holder[key] = {**frozen, **holder[key]}


def check_belongs(checkpoint: Mapping[str, Any], finetune: FineTune) -> None:
    """Raise ``CheckpointError`` unless a checkpoint was written by this kind of fine-tune."""
    if KEY not in checkpoint:
        raise CheckpointError(
            "this checkpoint was not written by LoRACallback. To fine-tune a full checkpoint, load it into the "
            "module first (load_from_checkpoint, or load_state_dict) and pass no ckpt_path"
        )
    apart = differences(checkpoint[KEY], finetune.description)
    if apart:
        raise CheckpointError(
            f"this checkpoint belongs to another fine-tune: {'; '.join(apart)}. Set the callback to the same values"
        )


def check_keys(names: Iterable[str], finetune: FineTune) -> None:
    """Raise ``CheckpointError`` unless these are exactly the tensors the fine-tune saves."""
    saved = set(names)
    missing, extra = [key for key in finetune.keys if key not in saved], sorted(saved - set(finetune.keys))
    if missing or extra:
        raise CheckpointError(
            f"this checkpoint lacks {listing(missing) or 'nothing'} and has beyond what is trained "
            f"{listing(extra) or 'nothing'}"
        )


def check_optimizers(checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Check that a checkpoint's optimizer states are of the optimizers they are loaded into.

    Raises:
        CheckpointError: If not; torch would find out at the first step, by a missing key.
    """
    here = [class_name(optimizer) for optimizer in optimizers]
    saved = checkpoint[KEY]["optimizers"]
    if saved != here:
        raise CheckpointError(
            f"this checkpoint holds the state of {listing(saved) or 'no optimizer'}, this run uses {listing(here)}. "
            "Set the callback's optimizer= and configure_optimizers as they were"
        )
