"""``NF4Config(fuse_delta=True)``: one product with ``W + s B A``, summed in float32 and rounded once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, NF4Config, inject, merge, quantize
from lightning_lora.nn.base import dense_weight
from tests.conftest import randomize, relative_difference

IN, OUT, R, SCALE = 64, 48, 4, 1.5


def adapted(fuse_delta: bool = True, *, dtype=torch.float32, bias=True, train=True, std=0.3, **settings) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))
    net = inject(net, "0", LoRAConfig(r=R, alpha=SCALE * R, **settings))
    return quantize(randomize(net, std=std) if std else net, NF4Config(fuse_delta=fuse_delta)).train(train)


def factors(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = net[0].adapter("default")
    return adapter.lora_A, adapter.lora_B


def is_fused(y: torch.Tensor) -> bool:
    return y.grad_fn.name() == "_FusedBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN), (0, IN)])
def test_output_and_gradients_are_those_of_the_dense_formula(shape, bias):
    net = adapted(bias=bias)
    A, B = factors(net)
    x = torch.randn(shape, requires_grad=True)
    weights = [t.detach().double().requires_grad_() for t in (x, A, B)]
    W, b = dense_weight(net[0].base_layer, torch.float64), net[0].bias
    y, exact = net(x), F.linear(weights[0], W + SCALE * weights[2] @ weights[1], None if b is None else b.double())
    assert is_fused(y)
    y.square().sum().backward()
    exact.square().sum().backward()
    for found, expected in zip((y, x.grad, A.grad, B.grad), (exact, *(t.grad for t in weights)), strict=True):
        assert found.shape == expected.shape
        # float32 sums of up to 64 products; of an empty input everything is zero
        assert torch.linalg.norm(found.double() - expected) <= 1e-5 * torch.linalg.norm(expected)
    with torch.no_grad():
        assert torch.equal(net(x), y)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_weight_is_rounded_once(autocast):
    """In bf16 the product is bit for bit that with the float32 sum rounded; a trained start would be lost otherwise."""
    net = adapted(dtype=torch.float32 if autocast else torch.bfloat16, bias=False)
    A, B = factors(net)
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    W = net[0].base_layer.dequantize(torch.float32).addmm_(B.detach().float(), A.detach().float(), alpha=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = net(x)
    assert torch.equal(y, x @ W.bfloat16().T)


def test_it_starts_at_the_base_model_bit_for_bit():
    net = adapted(std=0.0, dtype=torch.bfloat16)
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    assert torch.equal(net(x), net[0].base_layer(x))


def test_second_derivatives_are_those_of_two_branches():
    found = []
    for fused in (True, False):
        net = adapted(fused)
        torch.manual_seed(1)
        x = torch.randn(3, IN, requires_grad=True)
        inputs = (x, *factors(net))
        firsts = torch.autograd.grad(net(x).pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), inputs))
    for a, b in zip(*found, strict=True):
        assert relative_difference(a, b) <= 1e-4  # float32, sums of sums


def test_dropout_and_other_storages_have_two_branches():
    x = torch.randn(5, IN, requires_grad=True)
    assert not is_fused(adapted(dropout=0.5)(x))
    assert not is_fused(adapted(False)(x))
    assert is_fused(adapted(dropout=0.5, train=False)(x))


def test_a_weight_written_to_between_the_passes_is_noticed():
    net = adapted()
    y = net(torch.randn(5, IN))
    with torch.no_grad():
        factors(net)[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_it_is_no_part_of_how_a_weight_is_stored_or_merged():
    one, two = adapted(True), adapted(False)
    assert one[0].base_layer.storage == two[0].base_layer.storage
    assert torch.equal(merge(one)[0].weight, merge(two)[0].weight)


def test_a_value_that_is_no_choice_is_refused():
    with pytest.raises(ValueError, match="fuse_delta must be True or False, got 'yes'"):
        NF4Config(fuse_delta="yes")
