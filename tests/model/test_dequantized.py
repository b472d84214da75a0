"""Weights kept dequantized: the same results, within the memory there is, and gone when they have to be."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, QuantizationError, inject, merge, quantize, summary
from lightning_lora.metrics.memory import holdings
from lightning_lora.model.dequantized import forget_dequantized, keep_dequantized, kept_bytes, quantized_layers
from lightning_lora.quantization.formats import CONFIGS
from tests.conftest import randomize

WIDTH = 64
FP32 = 4 * WIDTH * WIDTH
"""Bytes of one weight that is kept."""

EVERY = pytest.mark.parametrize("storage", list(CONFIGS))


def model(storage: str = "nf4", layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = inject(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))), "*", LoRAConfig(r=2, dropout=0.2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantization='nf2'", UserWarning)
        return quantize(randomize(net), CONFIGS[storage]()).train()


def step(net: nn.Module, dtype: torch.dtype = torch.float32, autocast: bool = False) -> list[torch.Tensor]:
    """Output and gradients of one pass over an input that needs one as well."""
    torch.manual_seed(1)
    net.zero_grad()
    x = torch.randn(5, WIDTH).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def dequantizations(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What is dequantized from here on; each still is."""
    found: list[torch.dtype] = []
    kind = type(quantized_layers(net)[0])
    dequantize = kind.dequantize
    monkeypatch.setattr(kind, "dequantize", lambda layer, dtype: found.append(dtype) or dequantize(layer, dtype))
    return found


@EVERY
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_the_same_to_the_bit_and_nothing_is_dequantized_twice(storage, autocast, monkeypatch):
    net = model(storage)
    expected, state = step(net, autocast=autocast), net.state_dict()
    keep_dequantized(net, 2**20)
    calls = dequantizations(net, monkeypatch)
    for _ in range(3):
        assert equal(step(net, autocast=autocast), expected)
    assert calls == [torch.bfloat16 if autocast else torch.float32] * 3
    assert net.state_dict().keys() == state.keys()


def test_the_bare_layer_keeps_its_weight_too(monkeypatch):
    layer = quantized_layers(model())[0]
    keep_dequantized(layer, 2**20)
    calls = dequantizations(layer, monkeypatch)
    x = torch.randn(3, WIDTH, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(layer(x), layer(x))
    assert len(calls) == 1


def test_the_first_layers_get_the_room_and_no_more_is_taken():
    net = model(layers=4)
    room = keep_dequantized(net, 2 * FP32 + 100)
    step(net)
    assert [kept_bytes(layer) for layer in quantized_layers(net)] == [FP32, FP32, 0, 0]
    assert room.left == 100


def test_what_is_kept_is_counted():
    net = model()
    before, held = summary(net), holdings(net)
    keep_dequantized(net, 2**20)
    assert summary(net) == before  # nothing is kept before it was needed
    step(net)
    after = summary(net)
    assert kept_bytes(net) == after.model_bytes - before.model_bytes == after.base_bytes - before.base_bytes == 3 * FP32
    assert holdings(net).base - held.base == 3 * FP32


def test_another_dtype_takes_its_place(monkeypatch):
    net = model()
    room = keep_dequantized(net, 2**20)
    step(net)
    step(net, autocast=True)
    assert kept_bytes(net) == 3 * FP32 // 2
    assert room.left == 2**20 - 3 * FP32 // 2


@pytest.mark.parametrize("change", ["cast", "move", "load", "forget"])
def test_what_would_no_longer_be_right_or_wanted_is_given_back(change):
    net, other = model(), model()
    room = keep_dequantized(net, 2**20)
    step(net)
    assert kept_bytes(net) == 3 * FP32
    if change == "cast":
        net.to(torch.bfloat16)
        other.to(torch.bfloat16)
    elif change == "move":
        net.to("cpu")
    elif change == "load":
        for layer in quantized_layers(other):
            layer.codes.copy_(layer.codes.flip(0))
        net.load_state_dict(other.state_dict())
    else:
        forget_dequantized(net)
    assert kept_bytes(net) == 0
    assert room.left == 2**20
    dtype = torch.bfloat16 if change == "cast" else torch.float32
    assert equal(step(net, dtype), step(other, dtype))
    assert kept_bytes(net) == (0 if change == "forget" else 3 * WIDTH * WIDTH * dtype.itemsize)


def test_a_merge_is_that_of_the_codes():
    net = model()
    expected = merge(copy.deepcopy(net))
    keep_dequantized(net, 2**20)
    step(net, autocast=True)
    merged = merge(net)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), expected.parameters(), strict=True))


def test_an_evaluation_in_inference_mode_leaves_nothing_behind_that_training_could_not_use():
    net = model()
    keep_dequantized(net, 2**20)
    with torch.inference_mode():
        net(torch.randn(2, WIDTH))
    assert kept_bytes(net) == 0
    step(net)


def test_a_copy_has_room_of_its_own():
    net = model()
    room = keep_dequantized(net, 2**20)
    step(net)
    copied = copy.deepcopy(net)
    forget_dequantized(copied)
    assert kept_bytes(net) == 3 * FP32
    assert room.left == 2**20 - 3 * FP32


def test_a_model_that_is_not_quantized_is_refused():
    net = inject(nn.Sequential(nn.Linear(8, 8)), "*", LoRAConfig(r=2))
    with pytest.raises(QuantizationError, match="no layer of the model is quantized"):
        keep_dequantized(net, 2**20)
