"""Putting adapters in, switching and removing them."""

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    TargetError,
    activate,
    adapter_parameters,
    adapter_state_dict,
    delete_adapter,
    disabled,
    inject,
    merge,
    quantize,
    summary,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.lora import LoRA
from tests.conftest import randomize


def test_exactly_the_adapters_and_the_train_modules_are_trainable(net):
    inject(net, train="head")
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {"head.weight", "head.bias"}
    assert {id(p) for p in adapter_parameters(net)} == {
        id(p) for name, p in net.named_parameters() if name in trainable and "lora_" in name
    }


def test_a_failure_half_way_leaves_the_model_untouched(net, monkeypatch):
    """The fourth adapter of six cannot be made: out of memory, say."""
    made = []
    build = LoRA.reset_parameters

    def fail_at_fourth(adapter):
        made.append(adapter)
        if len(made) == 4:
            raise RuntimeError("out of memory")
        build(adapter)

    before = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    monkeypatch.setattr(LoRA, "reset_parameters", fail_at_fourth)
    with pytest.raises(RuntimeError, match="out of memory"):
        inject(net)
    assert {name: (id(p), p.requires_grad) for name, p in net.named_parameters()} == before


def test_injecting_twice_is_an_error_that_changes_nothing(net, tokens):
    randomize(inject(net))
    y = net(tokens)
    with pytest.raises(AdapterError, match="already holds an adapter 'default'"):
        inject(net)
    assert torch.equal(net(tokens), y)


@pytest.mark.parametrize("name", ["", "a.b", "../up", "/tmp/x", "a" * 65, "keys", "train"])
def test_names_that_would_break_keys_or_paths_are_refused(net, name):
    with pytest.raises(AdapterError, match="adapter name"):
        inject(net, name=name)


def test_adapters_are_switched_disabled_and_deleted_exactly(net, tokens):
    base = net(tokens)
    first = randomize(inject(net))(tokens)
    second = randomize(inject(net, "q_proj", LoRAConfig(r=2), name="second"))(tokens)
    with disabled(net):
        assert torch.equal(net(tokens), base)
    assert torch.equal(net(tokens), second)
    assert torch.equal(activate(net, "default")(tokens), first)
    assert {p.shape[0] for p in adapter_parameters(net) if p.shape[1] == 64} == {16}
    both = activate(net, "default", "second")(tokens)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    assert torch.equal(activate(delete_adapter(net, "default"), "second")(tokens), second)
    delete_adapter(net, "second")
    assert torch.equal(net(tokens), base)
    assert not [m for m in net.modules() if type(m).__name__ == "AdaptedLayer"]


def test_unknown_adapters_are_named_with_those_there_are(net):
    with pytest.raises(AdapterError, match="has no adapters, or they are merged; call inject"):
        activate(net, "default")
    inject(net)
    with pytest.raises(AdapterError, match="no adapter 'chat'; this model has: default"):
        activate(net, "chat")


def test_adapters_follow_the_mode_of_their_layer(net):
    inject(net.eval(), config=LoRAConfig(dropout=0.5))
    assert not any(module.training for module in net.modules())


def test_meta_model_is_materialized_with_fresh_adapters():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    inject(model, config=LoRAConfig(r=4))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear | LoRA):
            module.reset_parameters()
    x = torch.randn(2, 32)
    assert torch.isfinite(model(x)).all()
    with disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)


def test_summary_counts_every_parameter_once(net):
    dense = sum(p.numel() for p in net.parameters())
    inject(net, config=LoRAConfig(r=4), train="head")
    account = summary(net)
    adapters = 2 * (4 * (64 + 64) + 4 * (64 + 128) + 4 * (128 + 64))
    assert account.trainable == adapters + 64 * 8 + 8
    assert account.total == dense + adapters
    assert account.adapter_bytes == 4 * adapters
    assert "q_proj" in str(account)
    assert f"{account.trainable:,} of {account.total:,}" in str(account)


def replaced_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (nn.utils.weight_norm, "a hook computes its weight"),
        (nn.utils.spectral_norm, "a hook computes its weight"),
        (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "a hook computes its weight"),
        (replaced_forward, "its forward was replaced on the instance"),
        (lambda _: nn.LazyLinear(64), "it is lazy and has no shape yet"),
        (lambda layer: torch.compile(layer, backend="eager"), "was compiled by itself"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Lazy modules:UserWarning")
def test_a_layer_that_is_more_than_its_weight_is_refused(make, said):
    model = nn.Sequential(make(nn.Linear(64, 64)), nn.Linear(64, 8))
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=said):
        inject(model, "_orig_mod" if "compiled" in said else "0")
    assert list(model.state_dict()) == keys


def test_a_lazy_layer_elsewhere_is_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyConv1d(4, 3))
    with pytest.raises(TargetError, match=r"1\.weight, 1\.bias is lazy"):
        inject(model, "0")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("quantized", [False, True])
def test_hooks_run_on_the_adapted_and_on_the_merged_layer(quantized):
    model, seen = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), []

    def double(layer, args, output):
        seen.append(layer)
        return 2 * output

    handle = model[0].register_forward_hook(double)
    randomize(inject(model, "0"))
    if quantized:
        quantize(model)
    x = torch.randn(4, 64)
    adapted = model(x)
    assert torch.equal(model[0](x), 2 * model[0].forward(x))
    assert torch.allclose(merge(model)(x), adapted, atol=1e-5)
    assert isinstance(seen[-1], nn.Linear)
    handle.remove()
    assert not torch.allclose(model(x), adapted, atol=1e-2)


def test_hooks_go_back_to_the_plain_layer_of_a_deleted_adapter():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].register_forward_hook(lambda *args: 2 * args[-1])
    x = torch.randn(4, 64)
    before = model(x)
    assert torch.equal(delete_adapter(inject(model, "0"), "default")(x), before)


def test_an_adapter_deleted_while_disabled_stays_away(net, tokens):
    inject(net, config=LoRAConfig(r=4))
    inject(net, config=LoRAConfig(r=4), name="other")
    activate(net, "default", "other")
    with disabled(net):
        delete_adapter(net, "other")
    assert net(tokens).isfinite().all()


def test_a_second_adapter_leaves_what_the_first_trains_along(net):
    inject(net, "q_proj", train="head")
    keys = list(adapter_state_dict(net))
    inject(net, "up_proj", name="other")
    assert list(adapter_state_dict(net)) == keys
    assert "base_model.model.head.weight" in keys


@pytest.mark.parametrize("config", [{"r": 4}, LoRAConfig, None])
def test_what_is_no_config_is_refused(net, config):
    with pytest.raises(TypeError, match=r"config must be an adapter config such as LoRAConfig\(r=8\), got"):
        inject(net, config=config)
    assert not adapted_layers(net)
