"""A LightningModule as users write them, and runs of it that take a second and say nothing."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Net

MakeTrainer = Callable[..., Trainer]


class Module(LightningModule):
    """Regression on random tokens, with a schedule, and losses kept for comparison."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else Net()
        self.losses: list[float] = []

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, _):
        loss = (self(batch[0]) - batch[1][:, None]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val", (self(batch[0]) - batch[1][:, None]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def fresh() -> Module:
    """The same base every time, and the same random state behind it."""
    seed_everything(0, verbose=False)
    return Module()


def loader(shuffle: bool = False, count: int = 32) -> DataLoader:
    """Tokens and targets, the same every time."""
    draw = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randint(16, (count, 6), generator=draw), torch.randn(count, 8, generator=draw))
    return DataLoader(data, batch_size=8, shuffle=shuffle)


TOKENS = next(iter(loader()))[0]


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    """What a module says of :data:`TOKENS` in evaluation mode; its mode stays."""
    was = module.training
    found = module.eval()(TOKENS)
    module.train(was)
    return found


def trainers_in(folder: Path, **usual) -> MakeTrainer:
    """Make trainers that take callbacks and say nothing.

    Args:
        folder: Where they write.
        usual: Settings that each call may override.
    """
    return partial(_trainer, default_root_dir=folder, **usual)


def _trainer(*callbacks, **settings) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})
