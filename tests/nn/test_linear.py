"""The layer that holds adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject, merge, quantize
from tests.conftest import randomize


def test_a_forgotten_call_still_sees_the_adapter():
    """PyTorch's encoder layer reads ``linear1.weight`` in its fused evaluation path instead of calling the layer."""
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 32)
    model = randomize(inject(layer, ["linear1", "linear2"], LoRAConfig(r=4)))
    trained = model.train()(x)
    with torch.inference_mode():
        evaluated = model.eval()(x)
    assert torch.allclose(evaluated, trained, atol=1e-5)  # fp32, another order of summation


def test_weight_is_the_merged_weight_and_carries_gradients():
    model = randomize(inject(nn.Sequential(nn.Linear(16, 8)), config=LoRAConfig(r=2)))
    host = model[0]
    x = torch.randn(3, 16)
    assert torch.allclose(nn.functional.linear(x, host.weight, host.bias), host(x), atol=1e-6)
    host.weight.sum().backward()
    assert host.adapter("default").lora_A.grad.abs().sum() > 0
    expected = host.weight.detach().clone()
    assert torch.equal(merge(model)[0].weight, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(net, tokens, packed, clone):
    model = randomize(inject(net))
    model = quantize(model) if packed else model
    assert torch.equal(clone(model)(tokens), model(tokens))


@pytest.mark.parametrize("packed", [False, True])
def test_state_dict_reloads_strictly(net, tokens, packed):
    model = randomize(inject(copy.deepcopy(net)))
    twin = inject(net)
    if packed:
        quantize(model)
        quantize(twin)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(tokens), model(tokens))


def test_compiles_without_graph_breaks():
    model = randomize(inject(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), "*", LoRAConfig(r=2)))
    x = torch.randn(3, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
