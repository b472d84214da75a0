"""A model and data for YAML files: settings as arguments of ``__init__``, nothing known of LoRA."""

import os
import signal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Net


class Toy(LightningModule):
    """Regression on random tokens; losses and learning rates are kept for comparison. Its optimizer comes from YAML."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = Net(width)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch, _):
        loss = (self.net(batch[0]) - batch[1][:, None]).square().mean()
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, _):
        self.log("val", (self.net(batch[0]) - batch[1][:, None]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, _):
        return self.net(batch[0])


class Scheduled(Toy):
    """The same with an optimizer of its own."""

    def __init__(self, width: int = 64, lr: float = 1e-2) -> None:
        super().__init__(width)
        self.lr = lr

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class WithSteps(Scheduled):
    """The same with steps for before there are optimizers, whose rates ``training_step`` keeps."""

    def eva_step(self, batch):
        return self.net(batch[0])

    def memory_step(self, batch):
        return (self.net(batch[0]) - batch[1][:, None]).square().mean()


class Injected(Toy):
    """The same with optimizer and schedule as arguments."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.schedule = schedule

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [self.schedule(optimizer)]


class Failing(Scheduled):
    """The same, stopped in its first step by what ``how`` names."""

    def __init__(self, how: str = "error") -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch, _):
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "error":
            raise RuntimeError("the data ran out of numbers")
        os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, _)


class Data(LightningDataModule):
    """Random tokens and targets, shuffled."""

    def __init__(self, count: int = 32) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(5)
        data = TensorDataset(torch.randint(16, (self.count, 6), generator=draw), torch.randn(self.count, 8))
        return DataLoader(data, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.train_dataloader().dataset, batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader
