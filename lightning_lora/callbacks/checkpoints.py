"""Lightning checkpoints that hold the fine-tune alone: reduced before they are written, completed before they load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.callbacks.averaging import weights_in
from lightning_lora.callbacks.finetune import FineTune
from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.checkpoint_file import seal
from lightning_lora.io.description import KEY, differences
from lightning_lora.io.fingerprint import compare
from lightning_lora.io.keys import canonical
from lightning_lora.optim.report import class_name


def reduce_checkpoint(checkpoint: dict[str, Any], finetune: FineTune, optimizers: Sequence[Optimizer] = ()) -> None:
    """Leave in a checkpoint the weights the fine-tune changes, averages included, and describe it under :data:`KEY`."""
    entry = checkpoint.setdefault(KEY, {})
    if "version" in entry:
        return
    for holder, key in weights_in(checkpoint):
        if holder[key]:  # where weights are gathered from several processes, all but the first hold none
            available = {**finetune.state(), **holder[key]}
            holder[key] = {canonical(name): available[name] for name in finetune.keys}
    entry |= finetune.description | {
        "base_fingerprint": finetune.base_fingerprint,
        "optimizers": [class_name(optimizer) for optimizer in optimizers],
    }
    seal(checkpoint)


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
        holder[key] = {**frozen, **{name: holder[key][canonical(name)] for name in finetune.keys}}


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
    check_base(checkpoint[KEY], finetune)


def check_base(description: Mapping[str, Any], finetune: FineTune) -> None:
    """Raise ``CheckpointError`` if what a checkpoint holds was trained over other weights than the module's.

    Among these are the module's own after a merge: the update would be added a second time.
    """
    if "base_fingerprint" not in description:
        rank_zero_info("LoRA: the checkpoint does not say over which base it was trained, so this is not checked")
        return
    try:
        found = compare(description["base_fingerprint"], finetune.base, finetune.base_fingerprint)
    except ValueError as error:
        raise CheckpointError(f"this checkpoint is damaged: {error}") from None
    if found.unchecked:
        reasons = listing(f"{path} ({why})" for path, why in found.unchecked.items())
        rank_zero_info(f"LoRA: whether the base is the one trained on could not be checked in {reasons}")
    if found.differ:
        raise CheckpointError(
            f"this checkpoint belongs to another base model: {found}. Build the module with the weights it was trained "
            "on; a module whose adapters were merged is no longer that base. To start anew from trained adapters, save "
            "them as a folder, and load_adapter(model, folder, allow_base_mismatch=True)"
        )


def check_keys(names: Iterable[str], finetune: FineTune) -> None:
    """Raise ``CheckpointError`` unless these are exactly the tensors the fine-tune saves."""
    saved, expected = set(names), list(map(canonical, finetune.keys))
    missing, extra = [key for key in expected if key not in saved], sorted(saved - set(expected))
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
