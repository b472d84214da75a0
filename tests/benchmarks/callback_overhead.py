"""What the callback costs per training step, outside the adapted layers, beside a Trainer that knows nothing of LoRA.

Two Trainers step the same adapted module over the same batches, in turns: one with LoRACallback, one with a callback
whose hooks do nothing (Lightning calls the hooks of either). The layers compute the same in both, so the difference is
the callback. It does not grow with the model; a step of a fine-tune worth waiting for takes 50 ms and more.

  hooks        time spent inside the hooks that LoRACallback runs each step, added up
  difference   step with LoRACallback less step with the empty callback, median over the rounds
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from report import Claim, Report, command, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, inject

STEPS, LAYERS, WIDTH, STEP_MS = 300, 32, 64, 50.0
HOOKS = ("on_before_backward", "on_before_optimizer_step")


class Deep(LightningModule):
    """Many small layers: next to nothing to compute, as many adapters as a large model has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, 1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the mean of the outputs."""
        loss: torch.Tensor = self.net(batch[0]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of what is trained."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Empty(Callback):
    """The same hooks, doing nothing."""

    def on_before_backward(self, *_: Any) -> None:
        """Do nothing."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Do nothing."""


class Clock(Callback):
    """Milliseconds per step, the first ones left out."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Note when a step begins."""
        self.starts = [*getattr(self, "starts", []), time.perf_counter()]

    def step_ms(self) -> float:
        """The median step."""
        return 1e3 * statistics.median(b - a for a, b in zip(self.starts[20:], self.starts[21:], strict=False))


def measure(repeats: int) -> Report:
    """Let both take turns."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fit(Empty())  # imports finish and caches fill
    rounds = []
    for _ in range(repeats):
        lora = LoRACallback(r=4, quantization=None, optimizer=None, merge=False)
        spent = time_hooks(lora)
        rounds.append((fit(Empty()), fit(lora), 1e3 * sum(spent) / STEPS))
    empty, with_lora, hooks = (statistics.median(column) for column in zip(*rounds, strict=True))
    difference = statistics.median(lora - plain for plain, lora, _ in rounds)
    return Report(
        title=f"What LoRACallback costs per step ({LAYERS} adapted layers)",
        command=command(__file__, repeats),
        columns=[
            "step without, ms",
            "step with, ms",
            "difference, ms",
            "in its hooks, ms",
            f"% of a {STEP_MS:g} ms step",
        ],
        rows=[[empty, with_lora, difference, hooks, 100 * max(difference, hooks) / STEP_MS]],
        claims=[
            Claim("the callback takes at most 1% of a step of 50 ms, in %", 100 * max(difference, hooks) / 50, 1.0)
        ],
        note="*difference* is the median over rounds; the last column takes the larger of the two.",
    )


def fit(callback: Callback) -> float:
    """Train the adapted module and return the milliseconds of a step."""
    torch.manual_seed(0)
    clock = Clock()
    module = inject(Deep(), config=LoRAConfig(r=4))
    data = DataLoader(TensorDataset(torch.randn(STEPS, WIDTH)), batch_size=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, callback],
    )
    assert isinstance(module, Deep)
    trainer.fit(module, data)
    return clock.step_ms()


def time_hooks(callback: Callback) -> list[float]:
    """Have every call of the callback's hooks timed; returns the list that fills up."""
    spent: list[float] = []

    def timed(hook: Any) -> Any:
        def call(*arguments: Any) -> None:
            start = time.perf_counter()
            hook(*arguments)
            spent.append(time.perf_counter() - start)

        return call

    for name in HOOKS:
        setattr(callback, name, timed(getattr(callback, name)))
    return spent


if __name__ == "__main__":
    run(__doc__, measure, repeats=9)
