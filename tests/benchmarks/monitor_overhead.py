"""What AdapterMonitor costs per training step at its default interval, beside what the step itself takes.

A stack of linear layers over NF4 is trained by LoRACallback with AdapterMonitor among the callbacks, and every call of
the monitor's hooks is timed where it happens. Looking costs the same however large a batch is, so the batch here is a
small one: 256 tokens.

  step      median step, hooks included
  look      median of what a step costs in hooks in which values are logged (every 50th)
  rest      median of what any other step costs in hooks
  share     (look + 49 rest) / 50 of a step
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from report import Claim, Report, command, run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import AdapterMonitor, LoRACallback

EVERY, TOKENS = 50, 256
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
CASES = {
    "8 x 1024, r=16, lora": (8, 1024, 16, "lora"),
    "4 x 2048, r=16, lora": (4, 2048, 16, "lora"),
    "4 x 2048, r=64, lora": (4, 2048, 64, "lora"),
    "4 x 2048, r=16, dora": (4, 2048, 16, "dora"),
    "4 x 2048, r=256, vera": (4, 2048, 256, "vera"),
}


class Stack(LightningModule):
    """Linear layers, one on top of the other."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)), nn.Linear(width, 1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the mean of the outputs."""
        loss: torch.Tensor = self.net(self.embed(batch[0])).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer the callback swaps."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(Callback):
    """Milliseconds per step, the first one left out."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note when a step begins."""
        self.starts.append(time.perf_counter())

    def step_ms(self) -> float:
        """The median step."""
        return 1e3 * statistics.median(b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False))


def measure(repeats: int) -> Report:
    """Take each case."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows, claims = [], []
    for name, case in CASES.items():
        step, look, rest = fit(*case, looks=repeats)
        share = 100 * (look + (EVERY - 1) * rest) / EVERY / step
        rows.append([name, step, look, rest, share])
        claims.append(Claim(f"{name}: the monitor takes at most 1% of a step, in %", share, 1.0))
    return Report(
        title=f"What AdapterMonitor costs per step, looking every {EVERY} steps (NF4 base, {TOKENS} tokens)",
        command=command(__file__, repeats),
        columns=["layers", "step, ms", "look, ms", "any other step, ms", "% of a step"],
        rows=rows,
        claims=claims,
        note=(
            "*look* is a step at which everything is logged, *any other step* what the hooks take besides. It does not "
            "grow with the batch. Once in a run, at the first look, base weights are dequantized for their norms."
        ),
    )


def fit(depth: int, width: int, r: int, method: str, *, looks: int) -> tuple[float, float, float]:
    """Train, and return milliseconds: a step, hooks when values are logged, hooks otherwise."""
    torch.manual_seed(0)
    # Every 4th step is looked at, so that the run is short; a look costs the same after 4 steps as after 50.
    monitor, clock = AdapterMonitor(4), Clock()
    spent = time_hooks(monitor)
    settings = {} if method == "vera" else {"alpha": 2 * r}
    data = DataLoader(TensorDataset(torch.randint(16, (4 * (looks + 1), TOKENS))), batch_size=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, LoRACallback(r=r, method=method, merge=False, **settings), monitor],
    )
    trainer.fit(Stack(depth, width), data)
    steps = [1e3 * spent[index] for index in sorted(spent)][4:]  # up to the first look, in which bases are measured
    looked, rest = steps[3::4], [ms for index, ms in enumerate(steps) if index % 4 != 3]
    return clock.step_ms(), statistics.median(looked), statistics.median(rest)


def time_hooks(monitor: Callback) -> dict[int, float]:
    """Have every call of the callback's hooks timed; returns the seconds by step, which fill up."""
    spent: dict[int, float] = defaultdict(float)

    def timed(hook: Any) -> Any:
        def call(trainer: Trainer, *arguments: Any) -> None:
            start = time.perf_counter()
            hook(trainer, *arguments)
            spent[trainer.fit_loop.batch_idx] += time.perf_counter() - start

        return call

    for name in HOOKS:
        setattr(monitor, name, timed(getattr(monitor, name)))
    return spent


if __name__ == "__main__":
    run(__doc__, measure, repeats=9)
