"""Adapters that start in the weight, over a base in NF4: less is lost than by plain quantization, and never more."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    CheckpointError,
    LoRAConfig,
    NF4Config,
    QuantizationError,
    TargetError,
    activate,
    delete_adapter,
    disabled,
    inject,
    merge,
    quantize,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn import loftq
from lightning_lora.nn.decompose import without
from lightning_lora.quantization.nf4 import NF4Linear
from tests.conftest import randomize, relative_difference
from tests.quantization.test_quantize import in_4bit

STARTS = ["pissa", "pissa_niter_4", "olora", "loftq"]


def one(weight: torch.Tensor, init: str, **settings) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return quantize(inject(nn.Sequential(layer), "*", LoRAConfig(init=init, **settings)))


def error(weight: torch.Tensor, init: str, **settings) -> float:
    """``||W - (deq(Q) + s B A)||`` at the start."""
    with torch.no_grad():
        return loftq.norm(one(weight, init, **settings)[0].merged_weight() - weight)


def test_loftq_then_pissa_then_plain_nf4_lose_ever_more_of_a_weight():
    weight = torch.randn(128, 128)
    best, principal, plain = (error(weight, init, r=16) for init in ("loftq", "pissa", "kaiming"))
    # For r=16 of 128 the first LoftQ step alone takes off the 16 first of 128 components of the error
    assert best < principal < plain
    assert best < 0.85 * plain


def matrices() -> list[tuple[str, torch.Tensor, dict]]:
    draw = torch.Generator().manual_seed(7)
    normal = partial(torch.randn, generator=draw)
    found = []
    for index in range(10):
        shape = [(64, 64), (32, 128), (96, 48), (130, 66), (24, 512)][index % 5]
        alpha, scaling = [(4, "standard"), (32, "standard"), (0.5, "rslora")][index % 3]
        settings = {"r": [1, 4, 8][index % 3], "alpha": alpha, "scaling": scaling}
        small = {"r": 1, "alpha": alpha, "scaling": scaling}
        heavy = normal(*shape) / normal(*shape).abs().clamp(min=1e-3)  # Cauchy, cut off at a thousand
        found += [
            (f"normal {index}", normal(*shape), settings),
            (f"tiny {index}", normal(1 + index % 3, 2 + 2 * (index % 4)), small),
            (f"deficient {index}", normal(shape[0], index % 4) @ normal(index % 4, shape[1]), settings),
            (f"heavy-tailed {index}", heavy, settings),
            (f"small {index}", 1e-6 * normal(*shape), settings),
        ]
    return found


@pytest.mark.parametrize("init", STARTS)
def test_no_start_ever_makes_the_quantized_model_worse(init):
    """Fifty matrices of five sorts, alpha != r; equal counts as not worse, and rounding in float32 is allowed for."""
    worse = {}
    for name, weight, settings in matrices():
        plain, found = error(weight, "kaiming", **settings), error(weight, init, **settings)
        if found > plain + 1e-6 * weight.norm().item():
            worse[name] = found / plain
    assert not worse


def test_loftq_always_and_pissa_nearly_always_makes_it_better():
    better = dict.fromkeys(["pissa", "loftq"], 0)
    normal = [(weight, settings) for name, weight, settings in matrices() if name.startswith(("normal", "small"))]
    for weight, settings in normal:
        for init in better:
            better[init] += error(weight, init, **settings) < error(weight, "kaiming", **settings)
    assert better["loftq"] == len(normal)
    assert better["pissa"] >= 0.9 * len(normal)  # by chance a block's maximum can grow; then nothing is taken off


def test_each_loftq_start_is_the_best_correction_of_its_own_base():
    """Closed form: the error left is that of the singular values beyond R of ``W - deq(Q)``."""
    weight = torch.randn(48, 64)
    model = one(weight, "loftq", r=4, alpha=9)
    left = weight - model[0].base_layer.dequantize(torch.float32)
    bound = torch.linalg.svdvals(left.double())[4:].norm().item()
    with torch.no_grad():
        assert loftq.norm(model[0].merged_weight() - weight) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (8, 8)])
def test_more_loftq_steps_are_never_worse_and_the_first_is_the_svd_of_the_error(shape):
    base = nn.Linear(*shape)

    def rounded(matrix):
        return NF4Linear.from_linear(base, NF4Config(), weight=matrix).dequantize(torch.float32)

    for _ in range(10):  # of ten small matrices there is always one on which a step of the alternation is a step back
        weight = torch.randn(shape)
        errors = [loftq.fit(weight, rounded, 4, 0.5, steps=steps).error for steps in range(1, 7)]
        assert errors == sorted(errors, reverse=True)
        first = torch.linalg.svdvals((weight - rounded(weight)).double())[4:].norm().item()
        assert errors[0] == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_start_of_the_adapter_is_what_the_base_lacks(init):
    weight = torch.randn(32, 64)
    model = one(weight, init, r=4, alpha=9)
    adapter = model[0].adapter("default")
    taken = adapter.taken_A.view(torch.float32), adapter.taken_B.view(torch.float32)
    layer = nn.Linear(64, 32, bias=False)
    expected = NF4Linear.from_linear(layer, NF4Config(), weight=without(weight, taken, 9 / 4))
    assert torch.equal(model[0].base_layer.codes, expected.codes)
    x = torch.randn(5, 64)
    s, deq = 9 / 4, model[0].base_layer.dequantize(torch.float32)
    assert torch.allclose(model(x), x @ (deq + s * adapter.lora_B @ adapter.lora_A).T, atol=1e-5)
    assert model[0].base_lacks == "default"


@pytest.mark.parametrize("init", STARTS)
def test_without_the_adapter_the_model_is_where_it_started(net, tokens, init):
    quantize(inject(net, config=LoRAConfig(r=4, init=init)))
    start = net(tokens)
    randomize(net)
    with disabled(net):
        assert relative_difference(net(tokens), start) <= 1e-5  # float32, another order of summation
    inject(net, config=LoRAConfig(r=2), name="other")
    assert relative_difference(net(tokens), start) <= 1e-5
    activate(net, "default")
    assert relative_difference(net(tokens), start) > 1e-2
    activate(net, "other")
    assert relative_difference(merge(net)(tokens), start) <= 1e-5


@pytest.mark.parametrize("init", STARTS)
def test_an_adapter_beside_it_starts_in_the_whole_weight(net, tokens, init):
    quantize(inject(net, config=LoRAConfig(r=4, init=init)))
    start = net(tokens)
    inject(net, config=LoRAConfig(r=2, init="pissa"), name="other")
    assert relative_difference(net(tokens), start) <= 1e-5
    layer = adapted_layers(net)["downs.0"]
    other = layer.adapter("other")
    with torch.no_grad():
        left = loftq.norm(layer.base_weight() - other.config.scale * other.lora_B0 @ other.lora_A0)
        bound = torch.linalg.svdvals(layer.base_weight())[2:].norm().item()
    assert left == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_leaves_the_base_bit_identical_and_merges_to_the_trained_function(net, tokens, init, dropout):
    quantize(inject(net, config=LoRAConfig(r=4, init=init, dropout=dropout)))
    before = {name: t.clone() for name, t in net.state_dict().items() if "lora_" not in name}
    frozen = {name: t.clone() for name, t in net.state_dict().items() if name.endswith(("A0", "B0"))}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    for _ in range(3):
        net(tokens).square().mean().backward()
        optimizer.step()
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in (before | frozen).items())
    expected = net.eval()(tokens)
    assert relative_difference(merge(net)(tokens), expected) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_dropout_starts_at_the_quantized_base_too(net, tokens, init):
    quantize(inject(net, config=LoRAConfig(r=4, init=init, dropout=0.5))).train()
    assert relative_difference(net(tokens), net.eval()(tokens)) <= 1e-5


@pytest.mark.parametrize("init", STARTS)
def test_state_dict_round_trip(net, tokens, init):
    other = copy.deepcopy(net)
    randomize(quantize(inject(net, config=LoRAConfig(r=4, init=init))))
    quantize(inject(other, config=LoRAConfig(r=4, init=init)))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(tokens), net(tokens))
    assert torch.equal(copy.deepcopy(net)(tokens), net(tokens))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_whole_state_brings_its_base_and_an_adapter_alone_has_to_fit_it(net, tokens, init):
    """Here the other process has decomposed with other rounding: its start differs in the last bit."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.downs[0].weight.mul_(1 + 2**-20)
    randomize(quantize(inject(net, config=LoRAConfig(r=4, init=init))))
    quantize(inject(other, config=LoRAConfig(r=4, init=init)))
    state = net.state_dict()
    alone = {key: value for key, value in state.items() if ".adapters." in key}
    with pytest.raises(CheckpointError, match=r"downs\.0\.adapters\.default was trained over a base.*load_from_checkp"):
        other.load_state_dict(alone, strict=False)
    other.load_state_dict(state)
    assert torch.equal(other(tokens), net(tokens))


@pytest.mark.parametrize("init", STARTS)
def test_casts_leave_what_was_taken_off_as_it_is(net, init):
    quantize(inject(net, config=LoRAConfig(r=4, init=init)))
    before = {name: t.clone() for name, t in net.state_dict().items() if "taken_" in name}
    after = net.bfloat16().state_dict()
    assert all(torch.equal(after[name], bits) for name, bits in before.items())
    assert after["downs.0.adapters.default.lora_A0"].dtype == torch.float32  # as all of an adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_bases_of_every_dtype(init, dtype):
    model = one(torch.randn(64, 64).to(dtype), init, r=4)
    assert model[0].base_layer.merge_dtype == dtype
    assert model(torch.randn(3, 64, dtype=dtype)).dtype == dtype
    assert merge(model)[0].weight.dtype == dtype


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_quantized_by_others_is_taken_as_it_is(net, tokens, init):
    in_4bit(net, ["downs.0"])
    dense = copy.deepcopy(net)
    inject(net, ["downs.0"], LoRAConfig(r=4, init=init))
    start = inject(dense, ["downs.0"], LoRAConfig(r=4))(tokens)
    assert torch.equal(quantize(net)(tokens), start)
    assert adapted_layers(net)["downs.0"].base_lacks is None
    expected = randomize(net)(tokens)
    assert relative_difference(expected, start) > 1e-2
    assert relative_difference(merge(net)(tokens), expected) <= 1e-5


def test_loftq_over_a_base_that_is_quantized_already_is_refused(net):
    in_4bit(net, ["downs.0"])
    with pytest.raises(TargetError, match=r"downs\.0 is quantized already.*Use init='pissa'"):
        inject(net, config=LoRAConfig(r=4, init="loftq"))
    assert not adapted_layers(net)


def test_loftq_over_a_layer_that_stays_dense_is_refused_before_any_layer_changes():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 63), nn.Linear(63, 64))
    inject(model, "*", LoRAConfig(r=4, init="loftq"))
    with pytest.raises(QuantizationError, match=r"cannot be done for 2 \(in_features=63 is odd"):
        quantize(model)
    assert not [m for m in model.modules() if isinstance(m, NF4Linear)]


def test_an_adapter_that_its_base_needs_cannot_be_deleted(net):
    quantize(inject(net, config=LoRAConfig(r=4, init="pissa")))
    inject(net, config=LoRAConfig(r=2), name="other")
    with pytest.raises(AdapterError, match="was quantized without what adapter 'default' starts with"):
        delete_adapter(net, "default")
    delete_adapter(net, "other")


def test_of_two_adapters_one_start_is_taken_off_and_both_compute(net, tokens):
    inject(net, config=LoRAConfig(r=4, init="pissa"), name="a")
    inject(net, config=LoRAConfig(r=4, init="olora", alpha=4), name="b")
    quantize(activate(net, "a", "b"))
    start = net(tokens)
    for names in (("a",), ("b",), ("b", "a"), ()):
        activate(net, *names)
        assert relative_difference(net(tokens), start) <= 1e-5


def test_packed_weights_as_parameters_are_the_same(net, tokens):
    other = copy.deepcopy(net)
    quantize(inject(net, config=LoRAConfig(r=4, init="pissa")))
    quantize(inject(other, config=LoRAConfig(r=4, init="pissa")), hold="parameters")
    assert torch.equal(net(tokens), other(tokens))
