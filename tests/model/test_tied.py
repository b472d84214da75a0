"""Modules that stand in several places are adapted once; parameters that several modules hold are refused by name.

A layer under two names is one layer: one adapter, one quantized weight, one merged weight, in all of its places. A
weight that two layers hold would be untied by quantizing or merging one of them.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    TargetError,
    adapter_parameters,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.model.layers import adapted_layers
from tests.conformance.combinations import Experts, SelfAttention
from tests.conftest import randomize, relative_difference


class Twice(nn.Module):
    """Two modules, one after the other, or one of them twice."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x))


class Square(Experts):
    """Experts that map features to as many."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 16))


CONFIG = LoRAConfig(r=2, alpha=3)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "linear": (lambda: nn.Linear(16, 16), "first", 16),
    "conv": (lambda: nn.Conv1d(16, 16, 3, padding=1), "first", 16),
    "attention": (SelfAttention, "first.attention.*", 32),
    "experts": (Square, "first.up", 16),
}


def shared(kind: str) -> tuple[nn.Module, str, torch.Tensor]:
    build, target, width = LAYERS[kind]
    module = build()
    return Twice(module, module), target, torch.randn(3, width, width)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_shared_module_is_adapted_quantized_and_merged_once_in_all_its_places(kind, packed, tmp_path):
    model, target, x = shared(kind)
    plain, before = copy.deepcopy(model), model(x)
    inject(model, target, CONFIG)
    assert relative_difference(model(x), before) <= 1e-6  # attention computes in another order
    adapted, parameters = randomize(model, std=0.3), list(adapter_parameters(model))
    assert len(parameters) == 2 * len(adapted_layers(model))
    if packed and kind != "conv":
        quantize(adapted)
    assert model.first is model.second
    expected = model(x)
    assert relative_difference(expected, model.first(model.first(x))) == 0
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(plain), tmp_path)
    loaded = quantize(loaded) if packed and kind != "conv" else loaded
    assert torch.equal(loaded(x), expected)
    merge(model)
    assert model.first is model.second
    assert list(model.state_dict()) == list(plain.state_dict())
    assert relative_difference(model(x), expected) <= 1e-5  # fp32, another order of summation


@pytest.mark.parametrize("kind", LAYERS)
def test_deleting_the_adapter_leaves_one_shared_module(kind):
    model, target, x = shared(kind)
    kinds, before = [type(module) for module in model.modules()], model(x)
    delete_adapter(randomize(inject(model, target, CONFIG)), "default")
    assert model.first is model.second
    assert [type(module) for module in model.modules()] == kinds
    assert relative_difference(model(x), before) <= 1e-6  # frozen, torch's attention computes in another order


@pytest.mark.parametrize("kind", LAYERS)
def test_its_second_name_is_answered_with_its_first(kind):
    model, target, _ = shared(kind)
    with pytest.raises(TargetError, match=r"second name of first.*Pass 'first.*' for both places"):
        inject(model, target.replace("first", "second"), CONFIG)
    assert not adapted_layers(model)


def tied(build: Callable[[], nn.Module], tie: Callable[[nn.Module, nn.Module], None]) -> nn.Module:
    model = Twice(build(), build())
    tie(model.first, model.second)
    return model


def _linear(first: nn.Module, second: nn.Module) -> None:
    second.weight = first.weight


def _bias(first: nn.Module, second: nn.Module) -> None:
    second.bias = first.bias


def _packed(first: nn.Module, second: nn.Module) -> None:
    second.attention.in_proj_weight = first.attention.in_proj_weight


def _out_weight(first: nn.Module, second: nn.Module) -> None:
    second.attention.out_proj.weight = first.attention.out_proj.weight


def _out_module(first: nn.Module, second: nn.Module) -> None:
    second.attention.out_proj = first.attention.out_proj


def _stack(first: nn.Module, second: nn.Module) -> None:
    second.up = first.up


def _two_names(first: nn.Module, second: nn.Module) -> None:
    first.again = first.up


TIED = {
    "weight of linear layers": (LAYERS["linear"][0], _linear, "first", "first.weight, second.weight"),
    "bias of linear layers": (LAYERS["linear"][0], _bias, "first", "first.bias, second.bias"),
    "packed weight": (
        SelfAttention,
        _packed,
        "first.attention.k_proj",
        "first.*in_proj_weight, second.*in_proj_weight",
    ),
    "weight of out_proj": (SelfAttention, _out_weight, "first.attention.out_proj", "first.*weight, second.*weight"),
    "out_proj itself": (SelfAttention, _out_module, "second.attention.out_proj", "first.*weight, second.*weight"),
    "stack of experts": (Square, _stack, "second.up", "first.up, second.up"),
    "stack under two names": (Square, _two_names, "first.up", "first.up, first.again"),
}


@pytest.mark.parametrize("case", TIED.values(), ids=TIED)
def test_a_parameter_that_two_hold_is_refused_and_both_are_named(case):
    build, tie, target, names = case
    model = tied(build, tie)
    modules = list(model.modules())
    with pytest.raises(TargetError, match=rf"{target} shares its weight with another layer \({names}\): exclude="):
        inject(model, target, CONFIG)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
