"""Runs that are killed and resumed from their last checkpoint, beside the same run left alone.

A ``Scenario`` says what is trained, who writes checkpoints and where the run dies. Whoever resumes has nothing but the
script and the checkpoint: a new module, trainer and loader, and another random state, as in a new process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from tests.conftest import Net

EPOCHS, BATCHES, BATCH_SIZE = 3, 10, 4
WIDTH, RANK = 256, 16  # adapters of 4096 elements and more: below that, bitsandbytes keeps its states in 32 bits

Writer = Literal["steps", "batches", "validation", "epoch", "exception", "none"]
Moment = Literal["batch start", "backward", "batch end", "validation", "epoch end", "sigterm"]


class KilledError(Exception):
    """The end of a run that did not see it coming."""


@dataclass(frozen=True)
class Death:
    """Where a run ends: at a moment of the batch with this number, counted from 1 over all epochs."""

    batch: int
    moment: Moment = "batch end"


@dataclass(frozen=True)
class Scenario:
    """One run, and how it is killed.

    Attributes:
        quantization: Of the callback.
        optimizer: Of the callback.
        accumulation: Batches per optimizer step.
        writer: Who writes checkpoints: every ``every`` steps, at the end of every batch, after every validation, at the
            end of every epoch, when an exception was raised, or nobody but the callback after SIGTERM.
        deaths: Where the run dies, and, once resumed, dies again.
        every: Steps between the checkpoints of the writer ``"steps"``.
        schedule: Whether the learning rate changes with steps or with epochs.
        limit: Whether the run is so many epochs or so many steps long.
        validate_every: The Trainer's ``val_check_interval``; None for a run without validation.
        augment: Whether items draw from the global random states of torch, numpy and Python.
    """

    quantization: str | None = "nf4"
    optimizer: str | None = "paged_adamw_8bit"
    accumulation: int = 1
    writer: Writer = "batches"
    deaths: tuple[Death, ...] = (Death(14),)
    every: int = 3
    schedule: Literal["step", "epoch"] = "step"
    limit: Literal["epochs", "steps"] = "epochs"
    validate_every: int | float | None = 1.0
    augment: bool = False

    @property
    def length(self) -> dict[str, int]:
        """The run's length as the Trainer takes it; in steps, it ends in the middle of an epoch."""
        if self.limit == "epochs":
            return {"max_epochs": EPOCHS}
        return {"max_steps": {1: 25, 4: 8}[self.accumulation]}

    @property
    def batches(self) -> int:
        """How many batches the whole run trains."""
        return EPOCHS * BATCHES if self.limit == "epochs" else {1: 25, 4: 28}[self.accumulation]

    @property
    def first_checkpoint(self) -> int:
        """After how many batches there is a checkpoint to resume from."""
        match self.writer:
            case "steps":  # an epoch's last window is cut short: steps end after batches 4, 8 and 10
                return self.every if self.accumulation == 1 else (4, 8, 10)[self.every - 1]
            case "validation":
                return 5 if self.validate_every == 5 else BATCHES
            case "epoch":
                return BATCHES
        return 1


@dataclass
class Outcome:
    """What a run leaves behind.

    Attributes:
        records: Loss and learning rate of every batch, of a resumed run from where it was resumed.
        weights: What is trained, as it is before the merge.
        merged: The module's state after the run.
        optimizer: The optimizer's states, flat.
        schedule: The scheduler's state.
        resumed_after: How many batches each checkpoint that was resumed from had seen.
        logged: Losses as a logger got them, with their steps.
    """

    records: list[tuple[float, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    resumed_after: list[int] = field(default_factory=list)
    logged: list[tuple[int, float]] = field(default_factory=list)


class Tokens(Dataset):
    """Random tokens with random targets; with ``augment``, each item is changed anew whenever it is drawn."""

    def __init__(self, count: int, *, augment: bool = False) -> None:
        draw = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(16, (count, 6), generator=draw)
        self.targets = torch.randn(count, 8, generator=draw)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        target = self.targets[index]
        if self.augment:
            target = target + 0.1 * torch.randn(8) + 0.1 * random.gauss(0, 1) + 0.1 * float(np.random.randn())
        return self.tokens[index], target


class Regression(LightningModule):
    """A small network of known weights, and a record of what each batch gave."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Net(width=WIDTH, depth=1)
        self.schedule = schedule
        self.records: list[tuple[float, float]] = []

    def loss(self, batch) -> Tensor:
        return (self.net(batch[0]) - batch[1][:, None]).square().mean()

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.records.append((loss.item(), self.optimizers().param_groups[0]["lr"]))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.95 if self.schedule == "step" else 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


class Log(Logger):
    """A logger that keeps the losses it gets."""

    name = version = "log"

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome

    def log_metrics(self, metrics, step=None):
        if "loss" in metrics:
            self.outcome.logged.append((step, metrics["loss"]))

    def log_hyperparams(self, *_):
        """There are none."""


class SaveEveryBatch(Callback):
    """A user's own writer, also in the middle of an accumulation window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "batch.ckpt")


class Killer(Callback):
    """Ends the run at one moment of one batch.

    Args:
        death: Where.
        before: Batches that were trained before this run began.
    """

    def __init__(self, death: Death | None, before: int) -> None:
        self.death, self.before = death, before

    def _at(self, moment: Moment, module: Regression, *, under_way: int = 0) -> None:
        if self.death == Death(self.before + len(module.records) + under_way, moment):
            if moment == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise KilledError

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._at("batch start", pl_module, under_way=1)

    def on_after_backward(self, trainer, pl_module):
        self._at("backward", pl_module)
        self._at("sigterm", pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._at("batch end", pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self._at("validation", pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._at("epoch end", pl_module)


class Watch(Callback):
    """Looks at the end of the run before the adapters are merged: put before the LoRA callback."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_fit_end(self, trainer, pl_module):
        if not self.outcome.weights:  # a run that had nothing left to train
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.outcome.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.outcome.optimizer = dict(flat(trainer.optimizers[0].state_dict()))
        self.outcome.schedule = dict(flat(trainer.lr_scheduler_configs[0].scheduler.state_dict()))


def stateful_loader(dataset: Dataset) -> StatefulDataLoader:
    return StatefulDataLoader(dataset, BATCH_SIZE, shuffle=True)


def run_straight(scenario: Scenario, folder: Path, **parts: Any) -> Outcome:
    """Train without interruption; ``parts`` are those of :func:`attempt`."""
    seed(0)
    return attempt(replace(scenario, deaths=()), folder, **parts)


def run_killed(scenario: Scenario, folder: Path, **parts: Any) -> Outcome:
    """Train, die, and resume from the last checkpoint, as often as the scenario says."""
    seed(0)
    path, resumed_after = None, []
    for number in range(len(scenario.deaths)):
        with contextlib.suppress(KilledError, SystemExit):
            attempt(scenario, folder, path, number, **parts)
            raise AssertionError(f"{scenario.deaths[number]} did not come")
        path = last_checkpoint(folder)
        resumed_after.append(batches_seen(path))
        seed(1000 + number)  # whatever the new process has drawn so far
    outcome = attempt(scenario, folder, path, len(scenario.deaths), **parts)
    outcome.resumed_after = resumed_after
    return outcome


def run_killed_in_processes(scenario: Scenario, folder: Path) -> Outcome:
    """Do the same with a process for each attempt; those that die are killed by SIGKILL."""
    path, resumed_after = None, []
    for number in range(len(scenario.deaths) + 1):
        process = multiprocessing.get_context("spawn").Process(target=_process, args=(scenario, folder, path, number))
        process.start()
        process.join()
        if number < len(scenario.deaths):
            assert process.exitcode == -signal.SIGKILL, f"exit code {process.exitcode}"
            path = last_checkpoint(folder)
            resumed_after.append(batches_seen(path))
    outcome = torch.load(folder / "outcome.pt", weights_only=False)
    outcome.resumed_after = resumed_after
    return outcome


def _process(scenario: Scenario, folder: Path, path: Path | None, number: int) -> None:
    torch.set_num_threads(1)
    seed(1000 + number if number else 0)
    try:
        outcome = attempt(scenario, folder, path, number)
    except KilledError:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save(outcome, folder / "outcome.pt")


def attempt(
    scenario: Scenario,
    folder: Path,
    path: Path | None = None,
    number: int = 0,
    *,
    loader: Callable[[Dataset], Iterable] = stateful_loader,
    kind: type[Regression] = Regression,
) -> Outcome:
    """Train from the beginning or a checkpoint to the end or the death of this number."""
    module, outcome = kind(scenario.schedule), Outcome()
    death = scenario.deaths[number] if number < len(scenario.deaths) else None
    validation = None if scenario.validate_every is None else DataLoader(Tokens(8), BATCH_SIZE)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[
            Watch(outcome),
            LoRACallback(r=RANK, dropout=0.2, quantization=scenario.quantization, optimizer=scenario.optimizer),
            *writers(scenario, folder),
            Killer(death, 0 if path is None else batches_seen(path)),
        ],
        accumulate_grad_batches=scenario.accumulation,
        val_check_interval=scenario.validate_every,
        default_root_dir=folder,
        logger=Log(outcome),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **scenario.length,
    )
    data = Tokens(BATCHES * BATCH_SIZE, augment=scenario.augment)
    trainer.fit(module, loader(data), validation, ckpt_path=path)
    outcome.records = module.records
    outcome.merged = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return outcome


def writers(scenario: Scenario, folder: Path) -> list[Callback]:
    """The callbacks that write checkpoints; there is always a ModelCheckpoint, as in any run."""
    match scenario.writer:
        case "steps":
            return [ModelCheckpoint(folder, every_n_train_steps=scenario.every, save_last=True)]
        case "batches":
            return [ModelCheckpoint(folder, save_top_k=0), SaveEveryBatch(folder)]
        case "validation":
            return [ModelCheckpoint(folder, monitor="val", save_top_k=-1, save_on_train_epoch_end=False)]
        case "epoch":
            return [ModelCheckpoint(folder, save_last=True)]
        case "exception":
            return [ModelCheckpoint(folder, save_on_exception=True, save_last=True)]
        case "none":
            return [ModelCheckpoint(folder, save_top_k=0)]


def seed(value: int) -> None:
    """Seed every random state a run draws from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def last_checkpoint(folder: Path) -> Path:
    """Return the file written last."""
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def batches_seen(path: Path) -> int:
    """Return how many batches were trained when a checkpoint was written, over all epochs."""
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


def draw(dice: random.Random, quantization: str | None, optimizer: str | None, accumulation: int) -> Scenario:
    """Draw a scenario of this combination, in which there is a checkpoint before the first death."""
    writer = dice.choice(["steps", "batches", "validation", "epoch", "none"])
    scenario = Scenario(
        quantization,
        optimizer,
        accumulation,
        writer,
        every=dice.randint(1, 3),
        schedule=dice.choice(["step", "epoch"]),
        limit=dice.choice(["epochs", "steps"]),
        validate_every=dice.choice([1.0, 5] if writer == "validation" else [1.0, 5, None]),
        augment=dice.random() < 0.3,
    )
    earliest = scenario.first_checkpoint + (writer != "none")
    batches = sorted(dice.sample(range(earliest, scenario.batches + 1), dice.choice([1, 1, 2])))
    return replace(scenario, deaths=tuple(Death(batch, _moment(dice, scenario, batch)) for batch in batches))


def _moment(dice: random.Random, scenario: Scenario, batch: int) -> Moment:
    if scenario.writer == "none":
        return "sigterm"
    moments: list[Moment] = ["batch start", "backward", "batch end", "sigterm"]
    if batch % BATCHES == 0:
        moments += ["epoch end"] * 2
    if scenario.validate_every is not None and batch % (5 if scenario.validate_every == 5 else BATCHES) == 0:
        moments += ["validation"] * 2
    return dice.choice(moments)


def differences(straight: Outcome, killed: Outcome) -> list[str]:
    """Say in what a resumed run is not the uninterrupted one, bit for bit; nothing where it is."""
    found = []
    expected = straight.records[killed.resumed_after[-1] :]
    if len(killed.records) != len(expected):
        found.append(f"{len(killed.records)} batches after the resume, not {len(expected)}")
    elif killed.records != expected:
        first = next(i for i, pair in enumerate(zip(killed.records, expected, strict=True)) if pair[0] != pair[1])
        found.append(f"records from batch {killed.resumed_after[-1] + first + 1} on")
    for name in ("weights", "merged", "optimizer", "schedule"):
        one, other = getattr(straight, name), getattr(killed, name)
        if one.keys() != other.keys():
            found.append(f"the keys of {name}")
        elif not all(equal(one[key], other[key]) for key in one):
            found.append(name)
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their paths."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in items:
        yield from flat(inner, f"{path}.{key}")
