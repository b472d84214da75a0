"""Checkpoints of a model that FSDP2 has sharded: one file of whole adapter tensors, which one process can read too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_lora.callbacks.checkpoints import check_belongs, check_keys, check_optimizers
from lightning_lora.callbacks.finetune import FINETUNES
from lightning_lora.callbacks.processes import is_sharded
from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.checkpoint_file import require_whole


def full_state(module: LightningModule) -> dict[str, Tensor]:
    """Return the whole tensors of the fine-tune, on the CPU; the base is not gathered. All processes call this."""
    state = module.state_dict()
    return {key: _whole(state[key]).cpu() for key in FINETUNES[module].keys}


def load_sharded(
    strategy: ModelParallelStrategy,
    module: LightningModule,
    load: Callable[..., dict[str, Any]],
    path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Check that a checkpoint belongs to this fine-tune, then load it without asking for the frozen weights.

    Lightning loads weights and optimizers of a sharded model in one go, before any hook.

    Raises:
        CheckpointError: If it is another fine-tune's, or lacks a tensor.
    """
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path} is a folder of shards. Checkpoints of adapters are one file: pass "
            "ModelParallelStrategy(save_distributed_checkpoint=False) where it is written"
        )
    require_whole(Path(path))
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    finetune = FINETUNES[module]
    check_belongs(checkpoint, finetune)
    check_keys(checkpoint["state_dict"], finetune)
    compiled = [name for name in finetune.keys if name not in checkpoint["state_dict"]]
    if compiled:
        raise CheckpointError(
            f"{listing(compiled)} is in a submodule compiled by itself, where Lightning does not find it when it loads "
            "into a sharded model. Compile the whole module, torch.compile(module), instead"
        )
    if strategy.optimizers and "optimizer_states" in checkpoint:
        check_optimizers(checkpoint, strategy.optimizers)
    strict = module.strict_loading
    module.strict_loading = False
    try:
        return load(path, weights_only=weights_only)
    finally:
        module.strict_loading = strict


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor
