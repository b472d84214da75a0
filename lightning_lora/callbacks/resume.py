"""What a checkpoint needs beyond Lightning's own entries to resume bit for bit, of each process.

Lightning saves no random state, so a resumed run would shuffle and drop out differently; and a checkpoint between two
accumulated batches would lose the gradients of the first.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_lora.callbacks.processes import gather, is_sharded, rank, world_size
from lightning_lora.callbacks.rng import random_state, set_random_state


def process_states(trainer: Trainer, module: LightningModule, *, accumulating: bool) -> list[Any]:
    """Return the state of every process, in the order of ranks; all of them have to call this.

    Args:
        trainer: The Trainer.
        module: The module in training.
        accumulating: Whether there are gradients that no optimizer step has used yet.
    """
    mine = {"random": random_state(), "gradients": _gradients(module) if accumulating else {}}
    if trainer.interrupted and world_size() > 1:  # the others may be stuck in the step that failed here
        return [mine if index == rank() else None for index in range(world_size())]
    return gather(mine)


def restore_random_state(states: list[Any]) -> None:
    """Give this process the random state it had."""
    state = _mine(states)
    if state is not None:
        set_random_state(state["random"])


def restore_gradients(states: list[Any], module: nn.Module) -> None:
    """Give the parameters the gradients that had been accumulated."""
    state = _mine(states)
    parameters = dict(module.named_parameters())
    for name, gradient in (state or {"gradients": {}})["gradients"].items():
        parameters[name].grad = _like(parameters[name], gradient)


def tell_what_is_not_restored(states: list[Any]) -> None:
    """Say when the run will not be the uninterrupted one."""
    if len(states) != world_size():
        rank_zero_info(
            f"LoRA: the checkpoint is of {len(states)} processes and this run has {world_size()}; their random states "
            "do not carry over, so this run will not repeat the uninterrupted one bit for bit"
        )
    elif None in states:
        rank_zero_info(
            "LoRA: the checkpoint was written when a process failed and holds the random state of that process alone; "
            "this run will not repeat the uninterrupted one bit for bit"
        )


def _mine(states: list[Any]) -> Any:
    return states[rank()] if len(states) == world_size() else None


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: (grad.to_local() if is_sharded(grad) else grad).cpu() for name, grad in found.items()}


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    gradient = gradient.to(parameter.device)
    if not is_sharded(parameter):
        return gradient
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(gradient, parameter.device_mesh, parameter.placements)
