"""Adapters that start from data (EVA), in a run: from the training batches of a fit, or from a checkpoint.

The batches run through a copy of the module that shares its weights alone. What a step counts, logs or keeps is of the
copy, and nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_lora.callbacks.averaging import averagers
from lightning_lora.callbacks.drawing import draw, is_as_it_will_be
from lightning_lora.callbacks.processes import gather, world_size
from lightning_lora.callbacks.replica import silent_copy
from lightning_lora.errors import CheckpointError, UnsupportedError
from lightning_lora.io.description import KEY
from lightning_lora.io.keys import canonical
from lightning_lora.model.eva import directions
from lightning_lora.model.inject import apply
from lightning_lora.model.targets import Plan
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.lora import LoRAConfig

_BY_HAND = (
    "inject(module, config=LoRAConfig(init='eva', r=...)); initialize_eva(module, "
    "batches, forward=...); with quantization, quantize(module)"
)


@runtime_checkable
class EvaStep(Protocol):
    """A module that says how it is called with a training batch, where ``training_step`` does more than that."""

    def eva_step(self, batch: Any) -> object:
        """Compute on a batch whatever is to be adapted; no gradients, no optimizers, nothing is logged."""


def check_trainer_for_data(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what cannot wait for the ranks that data gives.

    Raises:
        UnsupportedError: Naming what stands in the way, and what to do.
    """
    by_hand = (
        "Do it by hand: inject(self, config=LoRAConfig(init='eva', r=...)), initialize_eva(self, batches, "
        "forward=...), and with quantization quantize(self)"
    )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UnsupportedError(
            "init='eva' runs the whole model on a few batches before it is sharded, which ModelParallelStrategy "
            f"(FSDP2) leaves no place for. {by_hand} in configure_model, before fully_shard"
        )
    if averagers(trainer):
        raise UnsupportedError(
            f"{type(averagers(trainer)[0]).__name__} copies the module before there is a batch, and init='eva' chooses "
            f"ranks by batches. {by_hand} before fit"
        )
    if trainer.state.fn == "fit" and not (module.automatic_optimization or isinstance(module, EvaStep)):
        raise UnsupportedError(
            f"init='eva' calls training_step on a few batches before there are optimizers, and that of "
            f"{type(module).__name__} optimizes by hand. Give it a method eva_step(self, batch) that calls the network"
        )


def from_loader(trainer: Trainer, count: int, module: LightningModule, plan: Plan) -> tuple[Plan, Mapping[str, Tensor]]:
    """Find the directions to start in, from up to ``count`` training batches; the module stays as it is.

    Raises:
        UnsupportedError: If this is no fit, or the loader cannot be read without a trace.
        ValueError: If a layer sees too few inputs or such as are not finite.
    """
    if not _from_data(plan):
        return plan, {}
    if trainer.state.fn != "fit":
        raise UnsupportedError(
            f"init='eva' starts adapters from training batches, which {trainer.state.fn} does not have. Pass a "
            "checkpoint as ckpt_path=, or fit first; or use init='kaiming', for any fresh adapter computes the same"
        )
    rank_zero_info(f"LoRA: running up to {count} training batches, for adapters that start from data")
    trainer.strategy.model_to_device()
    with isolate_rng(), _unlogged(trainer), _replica(module, trainer, plan) as replica:
        found = directions(
            replica,
            draw(
                trainer,
                count,
                asked="init='eva'",
                instead=f"Pass a DataLoader, or start the adapters before fit: {_BY_HAND}",
            ),
            forward=partial(_step, trainer),
            agree=lambda settled: all(gather(settled)),
        )
    return plan, _of_first_process({path: lora_A.clone() for path, lora_A in found.items()})


def from_checkpoint(
    checkpoint: Mapping[str, Any], module: LightningModule, plan: Plan
) -> tuple[Plan, Mapping[str, Tensor]]:
    """Put the ranks into the plan that were chosen when a checkpoint's run began; the starts are loaded with it.

    Raises:
        CheckpointError: If other ranks had been asked for there.
    """
    saved, waiting = checkpoint.get(KEY, {}), _from_data(plan)
    starts = saved.get("start")
    layers: dict[str, AdapterConfig] = dict(plan.layers)
    for path, config in waiting.items():
        rank, start = _of(saved.get("r"), path), _of(starts, path)
        if isinstance(rank, int) and start == config.init:
            layers[path] = config.with_rank(rank)
    told = _from_data(replace(plan, layers=layers))
    here, there = (sum(config.r for config in configs.values()) for configs in (waiting, told))
    if here != there:
        raise CheckpointError(
            f"this checkpoint belongs to another fine-tune: init='eva' had {there} ranks to share there and has {here} "
            "here. Set the callback to the same values"
        )
    return replace(plan, layers=layers), {}


def _from_data(plan: Plan) -> dict[str, LoRAConfig]:
    return {
        path: config
        for path, config in plan.layers.items()
        if isinstance(config, LoRAConfig) and config.starts_from == "data"
    }


def _of(value: Any, path: str) -> Any:
    """A field of one layer: descriptions hold one value where all layers agree."""
    return value.get(canonical(path)) if isinstance(value, Mapping) else value


@contextmanager
def _replica(module: LightningModule, trainer: Trainer, plan: Plan) -> Iterator[LightningModule]:
    """A copy with adapters, which shares the weights and is silent."""
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        replica = silent_copy(module, trainer, asked="init='eva'", instead=f"Start the adapters before fit: {_BY_HAND}")
        apply(replica, plan, start=False)
        yield replica
    finally:
        for parameter, mode in trained.items():
            parameter.requires_grad_(mode)


@contextmanager
def _unlogged(trainer: Trainer) -> Iterator[None]:
    """Have loggers that take everything and keep nothing, as in a ``fast_dev_run``."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _step(trainer: Trainer, replica: nn.Module, batch: Any) -> object:
    assert isinstance(replica, LightningModule)
    precision = trainer.precision_plugin
    with precision.train_step_context() if is_as_it_will_be(trainer) else nullcontext():
        if isinstance(replica, EvaStep):
            return replica.eva_step(batch)
        step = replica.training_step
        arguments = (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
        try:
            return step(*arguments)
        except (AttributeError, IndexError, TypeError) as error:  # what asking for an absent optimizer ends in
            raise UnsupportedError(
                f"init='eva' calls training_step on a few batches before there are optimizers, and that of "
                f"{type(replica).__name__} failed: {type(error).__name__}: {error}. If it reads a learning rate, or "
                "anything else that is only there in training, give the module a method eva_step(self, batch) that "
                "calls the network"
            ) from error


def _of_first_process(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first process has found, in all: each sees its own share of the data."""
    if world_size() == 1:
        return found
    shared = [{path: lora_A.cpu() for path, lora_A in found.items()}]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
