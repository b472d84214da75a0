"""A value is computed once in an optimizer step, and never served once what it was computed from has changed."""

import copy
import pickle

import bitsandbytes
import pytest
import torch
from torch import nn

from lightning_lora.nn.once_per_step import OncePerStep


class Sum:
    """The sum of one parameter, kept, and how often it was computed."""

    def __init__(self) -> None:
        self.module = nn.Linear(64, 64, bias=False)
        self.kept, self.computed, self.training = OncePerStep(), 0, True

    def read(self) -> float:
        return self.kept.get((self.module.weight,), self.training, self._compute).item()

    def _compute(self) -> torch.Tensor:
        self.computed += 1
        return self.module.weight.sum()

    def is_fresh(self) -> bool:
        return self.read() == self.module.weight.sum().item()


def paged_8bit(parameters) -> torch.optim.Optimizer:
    optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=0.1)
    optimizer._cpu_paged_warned = True
    return optimizer


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1),
    "PagedAdamW8bit": paged_8bit,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_step_of_any_optimizer_computes_it_once_more(make):
    value = Sum()
    optimizer = make([value.module.weight])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = value.module.weight.square().sum()
        loss.backward()
        return loss

    for step in range(3):
        assert value.is_fresh()
        assert value.is_fresh()
        assert value.computed == step + 1
        closure()
        optimizer.step(closure)


def write_in_place(value: Sum) -> None:
    nn.init.zeros_(value.module.weight)


def write_through_data_and_evaluate(value: Sum) -> None:
    """As weight averaging does around a validation."""
    value.training = False
    value.module.weight.data.copy_(torch.ones(64, 64))


def load(value: Sum) -> None:
    value.module.load_state_dict({"weight": torch.ones(64, 64)})


def load_by_assignment(value: Sum) -> None:
    value.module.load_state_dict({"weight": torch.ones(64, 64)}, assign=True)


def cast(value: Sum) -> None:
    value.module.to(torch.bfloat16)


def replace_data(value: Sum) -> None:
    value.module.weight.data = torch.ones(64, 64)


def replace_parameter(value: Sum) -> None:
    value.module.weight = nn.Parameter(torch.ones(64, 64))


@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        write_through_data_and_evaluate,
        load,
        load_by_assignment,
        cast,
        replace_data,
        replace_parameter,
    ],
)
def test_it_is_never_stale(change):
    value = Sum()
    value.read()
    change(value)
    assert value.is_fresh()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_start_empty(clone):
    value = Sum()
    value.read()
    twin = clone(value)
    twin.module.weight.data.zero_()
    assert twin.read() == 0
    assert value.computed == 1


def test_a_value_from_inference_mode_can_be_trained_on():
    value = Sum()
    with torch.inference_mode():
        value.read()
    kept = value.kept.get((value.module.weight,), True, value._compute)
    assert value.computed == 1
    x = torch.ones((), requires_grad=True)
    (x * kept).backward()


def test_weights_made_in_inference_mode_are_not_kept_for():
    with torch.inference_mode():
        value = Sum()
    value.read()
    value.read()
    assert value.computed == 2


def test_no_tensor_is_kept_alive():
    import weakref

    value = Sum()
    value.read()
    weight = weakref.ref(value.module.weight)
    value.module.weight = nn.Parameter(torch.ones(64, 64))
    assert weight() is None
