"""Quantizing a model's adapted layers, and taking over layers that are quantized already."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

from lightning_lora import (
    FP4Config,
    Int8Config,
    LoRAConfig,
    QuantizationError,
    TargetError,
    disabled,
    inject,
    merge,
    quantize,
    summary,
)
from lightning_lora.quantization.fp4 import FP4Linear
from lightning_lora.quantization.nf4 import NF4Linear
from lightning_lora.quantization.quantize import check_quantizable
from tests.conftest import randomize, relative_difference


def in_4bit(model: nn.Module, names: list[str], **settings) -> nn.Module:
    """Replace layers by bitsandbytes' own, quantized on the CPU as a user would."""
    for name in names:
        dense = model.get_submodule(name)
        settings = {"quant_type": "nf4", "compute_dtype": torch.float32} | settings
        layer = bitsandbytes.nn.Linear4bit(dense.in_features, dense.out_features, dense.bias is not None, **settings)
        layer.load_state_dict(dense.state_dict())
        model.set_submodule(name, layer.to("cpu"))
    return model


def test_only_the_layers_under_adapters_are_quantized(net):
    quantize(inject(net, ["q_proj", "downs.0"]))
    packed = {name for name, module in net.named_modules() if isinstance(module, NF4Linear)}
    assert packed == {"blocks.0.q_proj.base_layer", "blocks.1.q_proj.base_layer", "downs.0.base_layer"}


def test_logical_counts_are_those_of_the_dense_model(net):
    dense = summary(inject(net))
    packed = summary(quantize(net))
    assert (packed.trainable, packed.frozen, packed.total) == (dense.trainable, dense.frozen, dense.total)
    assert packed.base_bytes < dense.base_bytes / 5


def test_quantizing_twice_changes_nothing(net):
    state = copy.deepcopy(quantize(inject(net)).state_dict())
    assert all(torch.equal(value, state[key]) for key, value in quantize(net).state_dict().items())


def test_another_format_than_the_one_there_is_refused(net):
    quantize(inject(net))
    with pytest.raises(QuantizationError, match=r"q_proj \(nf4/64 double-quantized\).* is quantized already"):
        quantize(net, Int8Config())


@pytest.mark.parametrize(("config", "meant"), [("int8", "Int8Config"), (4, "NF4Config"), (FP4Config, "NF4Config")])
def test_what_is_no_config_is_refused_with_the_one_that_was_meant(net, config, meant):
    with pytest.raises(TypeError, match=rf"such as {meant}\(\), got"):
        quantize(inject(net), config)


def test_training_leaves_the_base_bit_identical(net, tokens):
    randomize(quantize(inject(net)))
    before = {name: t.clone() for name, t in net.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        net(tokens).square().mean().backward()
        optimizer.step()
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_weight_that_is_not_finite_is_refused_before_any_layer_changes(net, bad):
    inject(net)
    with torch.no_grad():
        net.downs[1].base_layer.weight[3, 4] = bad
    with pytest.raises(QuantizationError, match=r"base weight of downs\.1 holds NaN or infinity.*exclude='downs.1'"):
        quantize(net)
    assert not [m for m in net.modules() if isinstance(m, NF4Linear)]


def test_layers_the_cpu_cannot_pack_are_listed_and_kept_dense():
    model = inject(nn.Sequential(nn.Linear(63, 64), nn.Linear(64, 64), nn.Linear(64, 2)), config=LoRAConfig(r=2))
    kept = check_quantizable({"0": model[0], "1": model[1]})
    assert list(kept) == ["0"]
    assert "in_features=63 is odd" in kept["0"]
    quantize(model)
    assert [type(layer.base_layer) for layer in (model[0], model[1])] == [nn.Linear, NF4Linear]


def test_it_is_an_error_when_no_layer_can_be_packed():
    model = inject(nn.Sequential(nn.Linear(63, 64), nn.Linear(64, 2)), config=LoRAConfig(r=2))
    with pytest.raises(QuantizationError, match=r"none of the 1 adapted layers can be held in NF4.*quantization=None"):
        quantize(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = inject(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), config=LoRAConfig(r=2))
    with pytest.raises(QuantizationError, match="no kernel for it on meta"):
        quantize(model)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("codebook", "kind"), [("nf4", NF4Linear), ("fp4", FP4Linear)])
def test_linear4bit_layers_are_taken_over_with_their_codes(net, tokens, compress, codebook, kind):
    names = ["blocks.0.q_proj", "downs.0", "downs.1"]
    in_4bit(net, names, compress_statistics=compress, quant_type=codebook)
    codes = {name: net.get_submodule(name).weight.data.clone().reshape(-1) for name in names}
    expected = {
        name: bitsandbytes.functional.dequantize_4bit(
            net.get_submodule(name).weight.data, net.get_submodule(name).weight.quant_state
        )
        for name in names
    }
    before = net.train()(tokens).detach()
    inject(net)
    for name in names:
        base = net.get_submodule(name).base_layer
        assert type(base) is kind
        assert torch.equal(base.codes, codes[name])
        assert torch.equal(base.dequantize(torch.float32), expected[name])
    assert torch.equal(net(tokens), before)
    quantize(net)
    assert torch.equal(net.downs[0].base_layer.codes, codes["downs.0"])
    adapted = randomize(net)(tokens)
    assert relative_difference(merge(net)(tokens), adapted) <= 1e-5  # fp32, another order of summation


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda net: net.set_submodule("downs.0", bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4")),
            "not quantized yet",
        ),
        (
            lambda net: net.set_submodule("downs.0", bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False)),
            "Linear8bitLt is not quantized",
        ),
    ],
    ids=["unquantized", "8-bit"],
)
def test_foreign_layers_that_cannot_be_taken_over_are_named_and_nothing_changes(net, spoil, said):
    spoil(net)
    before = list(net.state_dict())
    with pytest.raises(TargetError, match=rf"downs\.0 cannot be adapted: .*{said}"):
        inject(net)
    assert list(net.state_dict()) == before


def test_a_linear4bit_that_an_evaluation_repacked_is_refused(net, tokens):
    in_4bit(net, ["downs.0"], compute_dtype=torch.bfloat16)
    layer = net.downs[0]
    with torch.no_grad():
        layer.eval()(torch.randn(1, 128, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks only on CPUs with AVX512-BF16 and its optional kernel")
    with pytest.raises(TargetError, match="evaluated on the CPU"):
        inject(net)


def test_the_base_computes_the_same_with_adapters_disabled(net, tokens):
    quantize(inject(net))
    base = net(tokens)
    randomize(net)
    with disabled(net):
        assert torch.equal(net(tokens), base)
