"""A LightningModule as users write them, and runs of it that take a second."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Net


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


@pytest.fixture
def module() -> Module:
    seed_everything(0, verbose=False)
    return Module()


def loader(shuffle: bool = False, count: int = 32) -> DataLoader:
    draw = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randint(16, (count, 6), generator=draw), torch.randn(count, 8, generator=draw))
    return DataLoader(data, batch_size=8, shuffle=shuffle)


@pytest.fixture
def trainer(tmp_path):
    """Make trainers that say nothing; settings override the defaults."""

    def make(*callbacks, **settings) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 2,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **settings})

    return make
