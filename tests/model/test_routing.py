"""A batch whose rows go through different adapters computes what each row would give alone."""

import copy
import threading

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    activate,
    delete_adapter,
    disabled,
    inject,
    load_adapter,
    merge,
    quantize,
    routed,
    save_adapter,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.vera import VeRAConfig
from tests.conftest import randomize, relative_difference
from tests.nn.test_kinds import LAYERS

NAMES = ["sql", None, "chat", "sql", "poem", None]
CONFIGS = {"sql": LoRAConfig(r=2), "chat": LoRAConfig(r=3, alpha=1), "poem": LoRAConfig(r=2, scaling="rslora")}


def several(model: nn.Module, targets: str = "*", configs: dict[str, LoRAConfig] = CONFIGS) -> nn.Module:
    for name, config in configs.items():
        randomize(inject(model, targets, config, name=name), std=0.2)
    return activate(model, *configs)


def alone(model: nn.Module, x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    """Each row by itself, through its adapter alone."""
    rows = []
    for row, name in zip(x.split(1), names, strict=True):
        activate(model, *([name] if name else []))
        rows.append(model(row))
    return torch.cat(rows)


def six(net: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return several(net, "all-linear"), torch.randint(16, (6, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quantized", [False, True])
def test_each_row_is_what_it_would_be_alone(net, quantized):
    model, tokens = six(net)
    if quantized:
        quantize(model)
    with routed(model, NAMES):
        found = model(tokens)
    assert relative_difference(found, alone(model, tokens, NAMES)) <= 1e-6  # float32, products of other row counts


@pytest.mark.parametrize("quantized", [False, True])
def test_eight_adapters_in_a_batch_of_sixteen_are_what_each_is_alone(net, quantized):
    names = [f"t{index * 5 % 8}" for index in range(16)]
    model = several(
        net, "all-linear", {name: LoRAConfig(r=2 + index % 3) for index, name in enumerate(sorted(set(names)))}
    )
    model = quantize(model) if quantized else model
    tokens = torch.randint(16, (16, 10), generator=torch.Generator().manual_seed(1))
    with routed(model, names):
        found = model(tokens)
    expected = alone(model, tokens, names)
    assert relative_difference(found, expected) <= 1e-6  # float32, products of other row counts
    assert relative_difference(found, alone(model, tokens, names[::-1])) > 1e-2


BATCHED = [kind for kind in LAYERS if "unbatched" not in kind]


@pytest.mark.parametrize("kind", BATCHED)
def test_rows_of_every_kind_of_layer(kind):
    build, x = LAYERS[kind]
    x = x.repeat(6, *(1,) * (x.dim() - 1))[:6]
    if x.is_floating_point():
        x = x + torch.randn_like(x)
    model = several(nn.Sequential(build().double()))
    with routed(model, NAMES):
        found = model(x)
    assert relative_difference(found, alone(model, x, NAMES)) <= 1e-13


@pytest.mark.parametrize("names", [["sql"] * 6, [None] * 6, ["sql"] * 2 + [None] + ["chat"] * 3, NAMES])
def test_any_arrangement_of_rows(net, names):
    model, tokens = six(net.double())
    with routed(model, names):
        found = model(tokens)
    assert relative_difference(found, alone(model, tokens, names)) <= 1e-13


def test_gradients_reach_each_adapter_from_its_own_rows_alone(net):
    """Against the sum of the losses of the rows alone, in float64; an adapter without rows gets none."""
    model, tokens = six(net.double())
    names = ["sql", None, "chat", "sql", None, None]
    weights = torch.randn(6, 10, 8, dtype=torch.float64)
    with routed(model, names):
        (model(tokens) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is None for name, grad in found.items() if ".poem." in name or ".adapters." not in name)
    for adapter in ("sql", "chat"):
        model.zero_grad()
        activate(model, adapter)
        mine = torch.tensor([name == adapter for name in names])
        (model(tokens[mine]) * weights[mine]).sum().backward()
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                assert relative_difference(found[name], parameter.grad) <= 1e-11, name


def test_only_what_is_activated_for_training_is_trained(net):
    model, tokens = six(net)
    activate(model, "sql", "chat", train="chat")
    with routed(model, NAMES):
        model(tokens).sum().backward()
    got = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"chat"}


def test_inner_layers_may_see_rows_flattened_into_the_batch_axis():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x.flatten(0, 1))))
            return y.unflatten(0, x.shape[:2])

    model, x = several(Flat().double(), configs={k: LoRAConfig(r=2) for k in CONFIGS}), torch.randn(6, 4, 5).double()
    with routed(model, NAMES):
        found = model(x)
    assert relative_difference(found, alone(model, x, NAMES)) <= 1e-13


def test_a_layer_without_the_adapter_is_its_plain_base_for_those_rows(net):
    inject(net.double(), "q_proj", LoRAConfig(r=2), name="sql")
    randomize(net)
    inject(net, "up_proj", LoRAConfig(r=2), name="chat")
    randomize(net)
    tokens = torch.randint(16, (3, 5))
    with routed(net, ["chat", "sql", None]):
        found = net(tokens)
    assert relative_difference(found, alone(net, tokens, ["chat", "sql", None])) <= 1e-13


def test_other_methods_are_routed_through_their_contract_alone():
    model = nn.Sequential(nn.Linear(12, 8).double())
    inject(model, "*", VeRAConfig(r=4, d_initial=1.0), name="vera")
    randomize(model, std=1.0)
    several(model, configs={"sql": CONFIGS["sql"]})
    x, names = torch.randn(4, 12).double(), ["vera", "sql", None, "vera"]
    with routed(model, names):
        found = model(x)
    expected = alone(model, x, names)
    assert not torch.allclose(expected[0], model[0].base_layer(x[0]))
    assert relative_difference(found, expected) <= 1e-13


def test_contexts_nest_and_an_exception_ends_them(net):
    model, tokens = six(net)
    active = activate(model, "poem")(tokens)
    with disabled(model):
        base = model(tokens)
        with routed(model, ["sql"] * 6):
            sql = model(tokens)
        assert torch.equal(model(tokens), base)
    with routed(model, ["sql"] * 6):
        with disabled(model):
            assert torch.equal(model(tokens), base)
        with routed(model, ["chat"] * 6):
            assert not torch.equal(model(tokens), sql)
        with pytest.raises(IndexError), routed(model, ["chat"] * 6):  # there are 16 tokens
            model(tokens + 16)
        assert torch.equal(model(tokens), sql)
    assert torch.equal(model(tokens), active)
    assert not model._forward_pre_hooks


def test_one_context_can_be_entered_for_a_part_of_the_model(net):
    model, x = several(net.double(), "all-linear"), torch.randn(2, 64).double()
    with routed(model.blocks[0], ["sql", "chat"]):
        found = model.blocks[0]["q_proj"](x)
        assert model.downs[0].rows is None
    assert relative_difference(found, alone(model.blocks[0]["q_proj"], x, ["sql", "chat"])) <= 1e-13


def test_state_is_saved_loaded_and_copied_the_same_within(net, tmp_path):
    model, tokens = six(net)
    save_adapter(activate(model, "sql"), tmp_path / "sql", "sql")
    keys = list(model.state_dict())
    with routed(model, NAMES):
        expected = model(tokens)
        assert list(model.state_dict()) == keys
        load_adapter(model, tmp_path / "sql", "sql")
        assert torch.equal(model(tokens), expected)
        assert torch.equal(copy.deepcopy(model)(tokens), expected)


def test_a_reader_of_weights_sees_that_there_is_no_one_weight():
    """PyTorch's fused encoder reads weights in evaluation; it has to call the layers instead."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).double().eval()
    model = several(encoder, "linear*")
    x = torch.randn(6, 4, 16).double()
    with torch.inference_mode(), routed(model, NAMES):
        found = model(x)
        assert model.layers[0].linear1.weight.shape == (32, 16)
        assert model.layers[0].linear1.weight.dtype == torch.float64
    with torch.inference_mode():
        assert relative_difference(found, alone(model, x, NAMES)) <= 1e-12
    with routed(model, NAMES), pytest.raises(AdapterError, match=r"no one weight computes; leave routed\(\)"):
        merge(model)
    assert adapted_layers(model)


def test_a_forward_in_inference_mode_does_not_spoil_a_later_one_that_trains(net):
    model, tokens = six(net)
    with routed(model, NAMES):
        with torch.inference_mode():
            model(tokens)
        model(tokens).sum().backward()


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["sql", "other"], AdapterError, "no adapter 'other'; this model has: sql, chat, poem"),
        ([], ValueError, "names is empty"),
        ("sql", TypeError, "names must be a list with a name, or None, for each row"),
        (None, TypeError, "names must be a list"),
        (["sql", 3], TypeError, "names must be a list"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_runs(net, names, error, said):
    model, _ = six(net)
    with pytest.raises(error, match=said), routed(model, names):
        raise AssertionError


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_another_number_of_rows_is_refused_when_the_model_is_called(net, count):
    model, tokens = six(net)
    with (
        routed(model, ["sql"] * count),
        pytest.raises(AdapterError, match=f"{count} names were routed, but Net is calle"),
    ):
        model(tokens)


def test_a_layer_whose_rows_cannot_be_told_apart_is_named(net):
    several(net, "all-linear")
    inject(net, "embed", LoRAConfig(r=2), name="tokens")
    with routed(net, ["sql", "chat"]):
        with pytest.raises(AdapterError, match=r"blocks\.0\.q_proj got an input of shape \(3, 64\)"):
            net.blocks[0]["q_proj"](torch.randn(3, 64))
        with pytest.raises(AdapterError, match=r"downs\.1 got an input of shape \(128,\)"):
            net.downs[1](torch.randn(128))
        with pytest.raises(AdapterError, match=r"embed got an input of shape \(10,\)"):  # positions, not a batch
            net.embed(torch.arange(10))
    convolution = several(nn.Sequential(nn.Conv1d(6, 6, 3)))
    with routed(convolution, ["sql", "chat"]), pytest.raises(AdapterError, match=r"0 got an input of shape \(6, 11\)"):
        convolution[0](torch.randn(6, 11))


def test_a_merged_model_has_no_adapters_to_route_to(net):
    model, _ = six(net)
    merge(model)
    with pytest.raises(AdapterError, match="Net has no adapters, or they are merged"), routed(model, ["sql"]):
        raise AssertionError


def test_an_adapter_in_use_is_not_deleted(net):
    model, tokens = six(net)
    with routed(model, NAMES):
        expected = model(tokens)
        with pytest.raises(AdapterError, match="rows are routed to adapter 'sql' now"):
            delete_adapter(model, "sql")
        assert torch.equal(model(tokens), expected)
    with routed(model, ["chat"] * 6):
        delete_adapter(model, "sql")


def test_it_holds_for_every_thread(net):
    """The state is the layers': documented, so that nobody expects otherwise."""
    model, tokens = six(net)
    found = []
    with routed(model, ["sql"] * 6), torch.no_grad():
        expected = model(tokens)
        thread = threading.Thread(target=lambda: found.append(model(tokens).detach()))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_adapters_that_start_in_the_weight_are_routed_as_they_compute_alone(net, tokens, init):
    """Over a base that was quantized without the start of one of them."""
    inject(net, config=LoRAConfig(r=4, init=init), name="first")
    quantize(net)
    inject(net, config=LoRAConfig(r=4), name="second")
    activate(net, "first", "second")
    randomize(net, std=0.02)
    alone = {}
    for name in ("first", "second"):
        activate(net, name)
        alone[name] = net(tokens)
    with disabled(net):
        alone[None] = net(tokens)
    names = ["first", "second", None, "first"]
    with routed(net, names):
        found = net(tokens)
    for row, name in enumerate(names):
        assert relative_difference(found[row], alone[name][row]) <= 1e-5  # fp32, another order of summation
