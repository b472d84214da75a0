"""Small real models that the tests share."""

import logging

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Embedding, two repeated blocks of linear layers, and a head: the shape of most models, in miniature."""

    def __init__(self, width: int = 64, depth: int = 2, out: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(width, width, bias=False), "up_proj": nn.Linear(width, 2 * width)})
            for _ in range(depth)
        )
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = x + down(torch.relu(block["up_proj"](x + block["q_proj"](x))))
        return self.head(self.norm(x))


@pytest.fixture(autouse=True)
def _levels_of_loggers():
    """The demo turns Lightning's loggers down for its process; the next test may want to read them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(16, (4, 10), generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Give every trainable parameter a random value, so that adapters have an effect."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
