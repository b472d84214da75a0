"""Biases that are trained along with adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    TargetError,
    activate,
    combine,
    delete_adapter,
    inject,
    merge,
    quantize,
)
from lightning_lora.model.biases import trained_biases
from tests.conftest import Net, randomize, relative_difference


class Mix(nn.Module):
    """Stacked experts with one bias for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 12, 16))
        self.bias = nn.Parameter(torch.randn(12))


class Stacks(nn.Module):
    """Experts between two linear layers, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(8, 16), Mix(), nn.Linear(12, 6)
        self.attn = nn.MultiheadAttention(8, 2)


def biases(model: nn.Module) -> list[str]:
    """Names of the biases that are trained, as they are in a model without adapters."""
    names = [name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad]
    return [name for name in names if name.endswith("bias")]


ADAPTED = ["blocks.0.up_proj.bias", "blocks.1.up_proj.bias"]
ALL = [*ADAPTED, "downs.0.bias", "downs.1.bias", "norm.bias", "head.bias"]


@pytest.mark.parametrize(("choice", "expected"), [("none", []), ("adapted", ADAPTED), ("all", ALL)])
def test_the_biases_that_were_asked_for_are_trained(choice, expected, net):
    inject(net, ["q_proj", "up_proj"], LoRAConfig(r=2), train_bias=choice)
    assert biases(net) == expected
    assert [f"{name}.bias" for name in trained_biases(net)] == expected


def test_the_bias_of_a_module_trained_whole_is_trained_once(net):
    inject(net, "q_proj", LoRAConfig(r=2), train="head", train_bias="all")
    assert biases(net) == ALL
    assert "head" not in trained_biases(net)


@pytest.mark.parametrize("over", ["dense", "nf4"])
@pytest.mark.parametrize("config", [LoRAConfig(r=2), DoRAConfig(r=2)], ids=["lora", "dora"])
def test_gradients_are_those_of_the_biases_and_the_merge_keeps_them(config, over, net, tokens):
    inject(net, ["q_proj", "up_proj"], config, train_bias="adapted")
    model = randomize(quantize(net) if over == "nf4" else net, std=0.1)
    assert biases(model) == ADAPTED
    model(tokens).square().sum().backward()
    layer = model.blocks[0]["up_proj"]
    gradient = layer.base_layer.bias.grad
    direction, step = torch.randn(gradient.shape, dtype=torch.float64), 1e-6
    model.double()
    bias = layer.base_layer.bias
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            bias.add_(direction, alpha=sign * step)
            losses.append(model(tokens).square().sum())
            bias.add_(direction, alpha=-sign * step)
    # float32's gradient against central differences in float64
    assert relative_difference((gradient.double() * direction).sum(), (losses[0] - losses[1]) / (2 * step)) <= 1e-4
    expected, value = model.float()(tokens), bias.detach().float().clone()
    merged = merge(model)
    assert relative_difference(merged(tokens), expected) <= 1e-5
    assert torch.equal(merged.blocks[0]["up_proj"].bias, value)
    assert trained_biases(merged) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_which_biases_are_trained(copied, net):
    model = copied(inject(net, "up_proj", LoRAConfig(r=2), train_bias="adapted"))
    assert biases(model) == ADAPTED
    assert trained_biases(model) == ["blocks.0.up_proj", "blocks.1.up_proj"]


def test_a_second_adapter_leaves_the_biases_of_the_first_trained(net):
    inject(net, "q_proj", LoRAConfig(r=2), train_bias="all", name="first")
    inject(net, ["q_proj", "up_proj"], LoRAConfig(r=2), name="second")
    assert biases(net) == ALL
    assert len(trained_biases(net, "first")) == len(ALL)
    delete_adapter(net, "second")
    assert biases(net) == ALL
    assert len(trained_biases(net, "first")) == len(ALL)
    activate(net, "first")
    delete_adapter(net, "first")
    assert trained_biases(net, "first") == []


def test_two_adapters_cannot_train_one_bias(net):
    inject(net, "up_proj", LoRAConfig(r=2), train_bias="all", name="first")
    before = [name for name, _ in net.named_parameters()]
    with pytest.raises(AdapterError, match=r"up_proj.* is trained along with adapter 'first' already"):
        inject(net, "up_proj", LoRAConfig(r=2), train_bias="adapted", name="second")
    assert [name for name, _ in net.named_parameters()] == before


def test_a_combined_adapter_has_the_biases_of_its_parts(net):
    inject(net, "up_proj", LoRAConfig(r=2), train_bias="adapted", name="first")
    inject(net, "up_proj", LoRAConfig(r=2), name="second")
    combine(net, {"first": 0.5, "second": 0.5}, name="both")
    assert trained_biases(net, "both") == trained_biases(net, "first")


@pytest.mark.parametrize(
    ("model", "targets", "choice", "error", "said"),
    [
        (
            Net,
            "q_proj",
            "adapted",
            TargetError,
            "train_bias='adapted' finds nothing to train: the adapted layers",
        ),
        (Net, "q_proj", "lora_only", ValueError, "train_bias must be one of none, adapted, all, got 'lora_only'"),
        (
            lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)}),
            ["attn.q_proj", "head"],
            "all",
            TargetError,
            r"the bias of attn\.q_proj, and nn\.MultiheadAttention keeps its biases packed",
        ),
        (lambda: Stacks(), "mix.up", "adapted", TargetError, "finds nothing to train: the adapted layers have no bias"),
        (lambda: Stacks(), "mix.up", "all", TargetError, "the bias of mix, which is taken apart while it is adapted"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_changes(model, targets, choice, error, said):
    model = model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(error, match=said):
        inject(model, targets, LoRAConfig(r=2), train_bias=choice)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("later", ["mix.up", "attn.q_proj"])
def test_a_module_whose_bias_is_trained_is_not_taken_apart_by_a_later_adapter(later):
    model = inject(Stacks(), "first", LoRAConfig(r=2), train_bias="all", name="one")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(AdapterError, match=r"the bias of (mix|attn\.out_proj) is trained along with another adapter"):
        inject(model, later, LoRAConfig(r=2), name="two")
    assert [name for name, _ in model.named_parameters()] == before


def test_biases_outside_of_what_an_earlier_adapter_took_apart_are_trained():
    model = inject(Stacks(), ["mix.up", "attn.q_proj"], LoRAConfig(r=2), name="one")
    with pytest.raises(TargetError, match=r"the bias of mix\.base_module, attn\..*, which is taken apart"):
        inject(model, "first", LoRAConfig(r=2), train_bias="all", name="two")
    inject(model, "first", LoRAConfig(r=2), train_bias="adapted", name="two")
    assert trained_biases(model, "two") == ["first"]
