"""A model and data for the recipes in ``examples/configs``: a small language model of bytes, to be adapted to a text.

It shows what a user's own file looks like: a LightningModule and a LightningDataModule that know nothing of LoRA, with
their settings as arguments of ``__init__``, where YAML finds them. The network is the one of ``lightning-lora demo``,
pretrained on Python's standard library; the text is English, or a file of yours (``--data.path notes.txt``)::

    lightning-lora fit --config examples/configs/qlora.yaml
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora.cli.demo import corpus, pretrain


class ByteLM(LightningModule):
    """The pretrained network, trained to predict the next byte.

    Args:
        lr: Highest learning rate, reached after a tenth of the steps.
    """

    def __init__(self, lr: float = 7e-3) -> None:
        super().__init__()
        self.network = pretrain.load_base()
        self.lr = lr

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(batch, time)`` bytes to ``(batch, time, 256)`` logits."""
        logits: Tensor = self.network(tokens)
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Mean loss in nats; logged in bits per byte."""
        return self._loss(batch[0], "train")

    def validation_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The same on held-out text."""
        return self._loss(batch[0], "val")

    def test_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The same on held-out text."""
        return self._loss(batch[0], "test")

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The byte that most likely follows each one."""
        following: Tensor = self(batch[0][:, :-1]).argmax(-1)
        return following

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: LoRA leaves the adapters in it. ``optimizer:`` in YAML would replace it."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, window: Tensor, name: str) -> Tensor:
        loss = F.cross_entropy(self(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        self.log(f"{name}_bits_per_byte", loss.detach() / math.log(2), prog_bar=True, sync_dist=name != "train")
        return loss


class Text(LightningDataModule):
    """Windows of a text: most of it to train on, the rest held out.

    Args:
        path: A text file; its last tenth is held out. None for English, the help topics of ``pydoc``.
        batch_size: Windows in a batch.
        context: Bytes in a window, at most 256.
    """

    def __init__(self, path: Path | None = None, batch_size: int = 8, context: int = 256) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.context = context

    def setup(self, stage: str) -> None:
        """Read the text."""
        text = corpus.english() if self.path is None else corpus.from_file(self.path)
        self.train = TensorDataset(corpus.windows(text.train, self.context))
        self.held_out = TensorDataset(corpus.windows(text.held_out, self.context, limit=200))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The training text, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The held-out text."""
        return DataLoader(self.held_out, self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader
