"""Parameters are built on the meta device, and everything else as it always is."""

import torch
from torch import nn

from lightning_lora import parameters_on_meta
from tests.conftest import Net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.register_buffer("mask", torch.arange(3), persistent=False)


def test_parameters_are_on_the_meta_device_and_buffers_are_not():
    with parameters_on_meta():
        model = Tied()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.mask, torch.arange(3))
    assert torch.equal(model.norm.running_var, torch.ones(4))
    assert model.head.weight is model.embed.weight
    assert (model.frozen.dtype, model.frozen.requires_grad) == (torch.float64, False)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in Tied().named_parameters()
    }


def test_modules_built_before_and_after_hold_values():
    before = Net()
    with parameters_on_meta():
        Net()
    assert not any(parameter.is_meta for parameter in [*before.parameters(), *Net().parameters()])


def test_no_memory_is_touched_for_parameters():
    """40 GB, and less than that is there in most machines: what is never written to is never given."""
    with parameters_on_meta():
        layers = [nn.Linear(50_000, 20_000, bias=False) for _ in range(10)]
    assert sum(layer.weight.nbytes for layer in layers) == 40 * 10**9


def test_a_lazy_parameter_stays_lazy():
    with parameters_on_meta():
        lazy = nn.LazyLinear(4)
    assert lazy(torch.ones(2, 3)).shape == (2, 4)
