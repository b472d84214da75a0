"""Fitting a run into a budget of memory before it begins: ``LoRACallback(memory="24GB")``.

A step of the run's own first training batch is made without values. What the user set is taken as it is; what was left
open is chosen, or, where nothing fits, the run is refused with settings that would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_lora.callbacks.averaging import averagers
from lightning_lora.callbacks.drawing import draw
from lightning_lora.callbacks.processes import gather
from lightning_lora.callbacks.replica import shared, silent_copy
from lightning_lora.callbacks.settings import Settings
from lightning_lora.errors import BudgetError, LoRAError, UnsupportedError
from lightning_lora.estimation.budget import largest
from lightning_lora.estimation.estimate import Estimate, estimate
from lightning_lora.estimation.plan import Choice, choose, ladder, size
from lightning_lora.estimation.setup import BLOCKS, PRECISIONS, Setup
from lightning_lora.model.blocks import repeated_blocks
from lightning_lora.optim.paged_adamw import PagedAdamW8bit
from lightning_lora.optim.swaps import Swap

PLANNED = "planned"
"""As ``activation_checkpointing``: what the budget asks for; without one, none."""
_MUCH = 0.1
"""Part of a total from which on it is worth a word."""
_INSTEAD = "Leave memory= out, and ask estimate(module, batch, callback, step=...) by hand"


@runtime_checkable
class MemoryStep(Protocol):
    """A module that says what a step computes, where ``training_step`` does more than that."""

    def memory_step(self, batch: Any) -> Tensor:
        """Return the loss of a batch: forward pass alone, on tensors that have shapes and no values."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the callback was asked for, and what of it is open.

    Attributes:
        settings: As they are where there is no budget.
        checkpointing: Patterns, None, or ``"planned"`` or ``"auto"``, which are open.
        dequantized_cache: Bytes.
        any_storage: Whether how the base under adapters is stored is open.
    """

    settings: Settings
    checkpointing: str | tuple[str, ...] | None
    dequantized_cache: int
    any_storage: bool

    @property
    def any_blocks(self) -> bool:
        """Whether it is open if blocks are recomputed."""
        return self.checkpointing in (PLANNED, "auto")

    def setup(self, swap: Swap | None, trainer: Trainer | None = None) -> Setup:
        """Return what decides how much memory a run takes.

        Args:
            swap: What Adam and AdamW become; None is counted as ``torch.optim.AdamW``.
            trainer: For precision and device; without one they are those of :class:`Setup`.

        Raises:
            UnsupportedError: If the Trainer's precision is none that is known here.
        """
        run: dict[str, Any] = {}
        if trainer is not None:
            on_cuda = trainer.strategy.root_device.type == "cuda"
            run = {"precision": str(trainer.precision), "device": "cuda" if on_cuda else "cpu"}
            if run["precision"] not in PRECISIONS:
                raise UnsupportedError(f"precision={run['precision']} cannot be estimated. {_INSTEAD}")
        rule: Any = "adamw" if swap is None else swap.name if isinstance(swap, PagedAdamW8bit) else swap
        has_adapters = self.settings.has_adapters
        return Setup(
            method="lora" if has_adapters else self.settings.method,
            config=self.settings.config if has_adapters else None,
            targets=self.settings.targets if has_adapters else "all-linear",
            exclude=self.settings.exclude,
            train=self.settings.train,
            train_bias=self.settings.train_bias,
            quantization=self.settings.quantization,
            embeddings=self.settings.embeddings,
            dequantized_cache=self.dequantized_cache if self.settings.quantization is not None else 0,
            optimizer=rule,
            activation_checkpointing=None if self.any_blocks else self.checkpointing,
            **run,
        )


def plan(trainer: Trainer, module: LightningModule, setup: Setup, budget: int, asked: Asked) -> Setup:
    """Choose what was left open so that a step of the first training batch fits, and say what was chosen and why.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        module: A module that stands and is not adapted yet; it stays as it is.
        setup: As asked for.
        budget: Bytes of a device.
        asked: What of it is open.

    Raises:
        BudgetError: If nothing fits; it says what would.
        UnsupportedError: If no step can be made beforehand.
    """
    check_plannable(trainer, module)
    batch = _first_batch(trainer)
    replica = silent_copy(module, trainer, asked="memory=", instead=_INSTEAD)

    def total(changed: Setup, sequences: Any = batch) -> Estimate:
        found = _estimated(trainer, replica, sequences, changed)
        most = max(gather(found.total))  # all processes have to choose the same
        return replace(found, parts={**found.parts, "workspace": found.parts["workspace"] + most - found.total})

    any_blocks = asked.any_blocks and bool(repeated_blocks(module))
    setups = ladder(setup, any_storage=asked.any_storage and setup.has_adapters, any_blocks=any_blocks)
    choice = choose(setups, total, budget)
    if choice.chosen is None:
        raise BudgetError(_refusal(choice, batch, trainer, total))
    rank_zero_info(f"LoRA: memory={size(budget)}, for a training batch such as the first:\n{choice}")
    return choice.chosen


def blocks_to_recompute(module: nn.Module, setup: Setup) -> str | tuple[str, ...] | None:
    """Return ``activation_checkpointing`` of a planned setup by the names that the module has."""
    chosen = setup.activation_checkpointing
    return tuple(repeated_blocks(module)) if chosen == BLOCKS else chosen


def check_plannable(trainer: Trainer, module: LightningModule) -> None:
    """Refuse runs whose memory is not that of one step of one module.

    Raises:
        UnsupportedError: Naming what stands in the way, and what to do.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UnsupportedError(f"memory= knows nothing of shards, and ModelParallelStrategy makes them. {_INSTEAD}")
    if averagers(trainer):
        raise UnsupportedError(
            f"memory= does not count the copy that {type(averagers(trainer)[0]).__name__} keeps. {_INSTEAD}"
        )
    if not (module.automatic_optimization or isinstance(module, MemoryStep)):
        raise UnsupportedError(
            f"memory= calls training_step before there are optimizers, and that of {type(module).__name__} optimizes "
            "by hand. Give it a method memory_step(self, batch) that returns the loss"
        )


def _first_batch(trainer: Trainer) -> Any:
    with isolate_rng():
        batch = next(draw(trainer, 1, asked="memory=", instead=f"Pass a DataLoader. {_INSTEAD}"), None)
    if batch is None:
        raise UnsupportedError(f"memory= counts a step of the first training batch, and there is none. {_INSTEAD}")
    return trainer.precision_plugin.convert_input(batch)


def _estimated(trainer: Trainer, replica: LightningModule, batch: Any, setup: Setup) -> Estimate:
    def step(model: nn.Module, hollow: Any) -> Tensor:
        assert isinstance(model, LightningModule)
        model.trainer = trainer  # which no copy of a LightningModule takes along
        with nullcontext() if setup.is_mixed else trainer.precision_plugin.train_step_context():
            return _loss(model, hollow)

    with isolate_rng():
        try:
            return estimate(replica, batch, setup, step=step, shared=shared(replica, trainer))
        except (LoRAError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, LoRAError) and not isinstance(error, UnsupportedError):
                raise
            raise UnsupportedError(
                f"memory= makes a step without values beforehand, and that of {type(replica).__name__} failed: "
                f"{type(error).__name__}: {error}. If training_step reads numbers out of tensors, or anything that is "
                "only there in training, give the module a method memory_step(self, batch) that returns the loss"
            ) from error


def _loss(model: LightningModule, batch: Any) -> Tensor:
    if isinstance(model, MemoryStep):
        return model.memory_step(batch)
    named = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
    output: Any = model.training_step(*((batch, 0) if named else (batch,)))
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"training_step returned a {type(loss).__name__} and no loss")
    return loss


def _refusal(choice: Choice, batch: Any, trainer: Trainer, total: Callable[..., Estimate]) -> str:
    """What was tried, what takes most of the least, and which settings would fit."""
    least = choice.least
    parts = sorted(((count, part) for part, count in least.parts.items() if count), reverse=True)
    told = ", ".join(f"{part} {size(count)}" for count, part in parts)
    lines = [f"nothing fits memory={size(choice.budget)}:", str(choice), f"The least is {size(least.total)}: {told}."]
    lines.append(_smaller_batch(choice, batch, trainer, total))
    if least.parts["logits"] > _MUCH * least.total:
        lines.append("The loss in chunks, chunked_cross_entropy(hidden, head, labels), takes a part of the logits.")
    if least.setup.has_adapters and least.setup.storage is not None:
        lines.append("A smaller model, or init='loftq' (down to 2 bits), takes less.")
    return "\n".join(lines)


def _smaller_batch(choice: Choice, batch: Any, trainer: Trainer, total: Callable[..., Estimate]) -> str:
    """The settings that compute the same steps in smaller pieces."""
    count = _sequences(batch)
    if count is None or count < 2:
        return "Shorter inputs, or a smaller batch, would take less." if count is None else "Shorter inputs take less."
    setup = choice.least.setup

    def pieces(n: int) -> int:
        return total(setup, tree_map_only(Tensor, lambda tensor: tensor[:n], batch)).total if n < count else 2**62

    most = largest(pieces, choice.budget, 0)
    piece = max((n for n in range(1, most + 1) if count % n == 0), default=0)
    if not piece:
        return f"Not even one of the {count} inputs of a batch fits; shorter inputs take less."
    steps = trainer.accumulate_grad_batches * count // piece
    return (
        f"DataLoader(batch_size={piece}) with Trainer(accumulate_grad_batches={steps}) fits, and makes the same steps "
        f"of {trainer.accumulate_grad_batches * count} (up to {most} inputs at once fit)."
    )


def _sequences(batch: Any) -> int | None:
    """How many inputs a batch has, if all its tensors agree on that."""
    counts = {leaf.shape[0] if leaf.dim() else None for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    return counts.pop() if len(counts) == 1 else None
