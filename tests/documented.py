"""What pages of the documentation take for granted: your model, your data, your own script's imports."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora as ll
from tests.io.test_hub import LocalHub


class Model(lightning.LightningModule):
    """A user's module, with names that the pages use."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.q_proj(x) + self.v_proj(x)))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Data(lightning.LightningDataModule):
    """A user's data: 8 vectors of two classes."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(8, 16), torch.randint(2, (8,))), batch_size=4)


def a_fine_tune(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model": Model(), "data": Data()}


def a_script(_: pytest.MonkeyPatch) -> dict[str, Any]:
    """The imports of a script about strategies."""
    return {
        "Trainer": lightning.Trainer,
        "LightningModule": lightning.LightningModule,
        "ModelParallelStrategy": ModelParallelStrategy,
        **{name: getattr(ll, name) for name in ("LoRACallback", "LoRAConfig", "inject", "quantize")},
    }


def a_command_line(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--trainer.fast_dev_run", "true", "--seed_everything", "1"])
    return {"MyModel": Model, "MyData": Data}


def an_adapted_model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One with adapters, and a hub that is a folder."""
    for name in ("push_adapter", "pull_adapter"):
        monkeypatch.setattr(ll, name, partial(getattr(ll, name), api=LocalHub(Path("hub"))))
    return {"model": ll.inject(Model(), ["q_proj", "v_proj"]), "torch": torch, "param_groups": ll.param_groups}


GIVEN: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "README.md": a_fine_tune,
    "docs/index.md": a_fine_tune,
    "docs/cli.md": a_command_line,
    "docs/disk.md": an_adapted_model,
    "docs/methods.md": an_adapted_model,
    "docs/running.md": a_script,
}
