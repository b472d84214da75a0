"""What a checkpoint needs beyond Lightning's own entries to resume bit for bit, of each process.

Lightning saves no random state, so a resumed run would shuffle and drop out differently; a checkpoint between two
accumulated batches would lose the gradients of the first; and stateful loaders do not always get their state back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch import Tensor, nn

from lightning_lora.callbacks.processes import gather, is_sharded, rank, world_size
from lightning_lora.callbacks.progress import Place, settle
from lightning_lora.callbacks.rng import random_state, set_random_state

NOT_EXACT = "this run will not repeat the uninterrupted one bit for bit"


@runtime_checkable
class Stateful(Protocol):
    """A loader that can go on from where it was: Lightning's and torchdata's convention."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there with the next ``iter``."""


@dataclass
class Resumption:
    """What a run that is being resumed still has to be given back.

    Attributes:
        processes: State of every process, as from :func:`process_states`.
        loaders: States of the stateful training loaders, in their order.
        place: Where the checkpoint stands.
    """

    processes: list[Any]
    loaders: list[dict[str, Any]]
    place: Place

    @classmethod
    def of(cls, loops: dict[str, Any], processes: list[Any], *, validation_due: bool) -> Resumption:
        """Take from a checkpoint's ``fit_loop`` what Lightning would not, or not always, give back."""
        place = settle(loops, validation_due=validation_due)
        return cls(processes, loops["state_dict"].pop("combined_loader", []), place)

    def restore_loader(self, loader: object) -> None:
        """Before the first iteration over a loader: bring it, and the random state it draws from, to the place."""
        if isinstance(loader, Stateful) and self.loaders:
            loader.load_state_dict(self.loaders.pop(0))
            if self.place.epoch_over:
                iter(loader)  # type: ignore[call-overload]  # the old epoch's; the next one begins the new epoch
        if self.place.epoch_over:
            restore_random_state(self.processes)

    def restore_run(self, module: nn.Module) -> None:
        """Before the first batch: what making the iterators has drawn is undone, and gradients are put back."""
        if not self.place.epoch_over:
            restore_random_state(self.processes)
            restore_gradients(self.processes, module)


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


def tell_what_is_not_restored(resumption: Resumption, trainer: Trainer) -> None:
    """Say why the run will not be the uninterrupted one, where it will not."""
    for reason in _reasons(resumption, trainer):
        rank_zero_info(f"LoRA: {reason}; {NOT_EXACT}")


def _reasons(resumption: Resumption, trainer: Trainer) -> Iterator[str]:
    states, place = resumption.processes, resumption.place
    if len(states) != world_size():
        yield (
            f"the checkpoint is of {len(states)} processes and this run has {world_size()}, so random states do not "
            "carry over"
        )
    elif None in states:
        yield "the checkpoint was written when a process failed and holds the random state of that process alone"
    if place.inside_batch:
        yield "the checkpoint was written in the middle of a batch, which is passed over"
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    if place.inside_epoch and not all(isinstance(loader, Stateful) for loader in loaders):
        yield "the epoch starts again at its first batch: a training loader has no state_dict and load_state_dict"
    if resumption.loaders:
        yield "the checkpoint holds the state of more stateful training loaders than there are"
    elif trainer.num_training_batches == float("inf"):
        yield (
            "the training loader has no length, so Lightning fetches one batch ahead, which is now passed over. Give "
            "it a length, or set limit_train_batches="
        )
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        yield "Lightning passes over the step of ReduceLROnPlateau that ends the epoch of the checkpoint"


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
