"""The promises that every combination of method, start, kind of layer and storage keeps."""

import copy
import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import AdapterError, LoRAError, activate, delete_adapter, disabled, inject, merge, summary
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.nn.base import dense_weight
from tests.conformance.combinations import (
    KINDS,
    STORAGES,
    Combination,
    adapter_of,
    every_combination,
    refusal,
    twin,
)
from tests.conformance.formulas import FORMULAS
from tests.conformance.table import table
from tests.conftest import randomize, relative_difference

F64 = torch.float64
NOT_LINEAR = {"embedding", "conv1d", "conv2d", "conv3d"}
FORBIDDEN = {
    *((method, kind, "nf4") for method in METHODS for kind in KINDS if kind != "linear"),
    *(("lora_fa", "embedding", storage) for storage in STORAGES),
    *(("vera", kind, storage) for kind in NOT_LINEAR for storage in STORAGES),
}
EVERY = list(every_combination())
ALLOWED = [c for c in EVERY if (c.method, c.kind, c.storage) not in FORBIDDEN]
REFUSED = [c for c in EVERY if c not in ALLOWED]
ZERO_UPDATE = {None, "kaiming", "gaussian"}
"""Starts at which a factor is zero, rather than the product of two that are not."""

ROUNDING = {"fp32": 1e-5, "bf16": 2**-6, "nf4": 1e-5}
"""Relative. Sums of at most 64 products of float32; or four roundings to bf16, of 2^-8 each."""


def over(combinations: Iterable[Combination], *storages: str) -> pytest.MarkDecorator:
    """Run a test over the combinations, of these storages alone if any are given."""
    chosen = [c for c in combinations if not storages or c.storage in storages]
    return pytest.mark.parametrize("combination", [pytest.param(c, id=str(c)) for c in chosen])


ONE_START = [c for c in ALLOWED if c.init in (None, "kaiming")]
every, each = over(ALLOWED), over(ONE_START)


def gradients(model: nn.Module, x: Tensor, run=lambda model, x: model(x)) -> dict[str, Tensor]:
    """Of a fixed function of the output, by parameter; the input's is called ``x``."""
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    y = run(model, x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | ({"x": x.grad} if x.is_floating_point() else {})


@every
def test_training_starts_at_the_base_model(combination):
    model, x = combination.fresh(), combination.input()
    with disabled(model):
        expected = model(x)
    found = model(x)
    assert found.dtype == expected.dtype
    if combination.init in ZERO_UPDATE:
        assert torch.equal(found, expected)
    else:
        assert relative_difference(found, expected) <= ROUNDING[combination.storage]


@over(ALLOWED, "fp32", "nf4")
def test_output_and_gradients_are_those_of_the_dense_formula(combination):
    """In float64, also over NF4, where the formula is of the dequantized weight."""
    model, x = combination.trained(F64), combination.input(F64)
    found, output = gradients(model, x), model(x)
    adapter, base = adapter_of(model), combination.base(F64)
    W = adapter.kind.to_matrix(dense_weight(model[0].base_layer, F64))
    t = {name: value.detach().clone().requires_grad_() for name, value in adapter.named_parameters()}
    t |= {name: value.detach() for name, value in adapter.named_buffers()}
    weight = adapter.kind.from_matrix(FORMULAS[combination.method](W, t, adapter.config))
    plain = nn.Sequential(base[0])

    def run(_: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(plain, {"0.weight": weight}, (x,))

    expected = gradients(plain.requires_grad_(False), x, run)
    expected |= {
        f"0.adapters.default.{name}": t[name].grad for name, p in adapter.named_parameters() if p.requires_grad
    }
    assert relative_difference(output, run(plain, x)) <= 1e-12
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_difference(found[name], grad) <= 1e-12, name


@every
def test_gradients_reach_every_trained_parameter_and_no_other(combination):
    model = combination.trained()
    reached = {name for name in gradients(model, combination.input()) if name != "x"}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("0.adapters.default.") for name in reached)


@every
def test_the_merged_layer_computes_the_adapted_function(combination):
    model, x = combination.trained(), combination.input()
    keys = list(combination.base().state_dict())
    adapted = model(x)
    merged = merge(model)
    assert list(merged.state_dict()) == keys
    assert type(merged[0]) is type(combination.base()[0])
    assert relative_difference(merged(x), adapted) <= ROUNDING[combination.storage]


@over(ONE_START, "bf16")
def test_half_precision_is_near_the_same_function_in_double(combination):
    model, x = combination.trained(), combination.input()
    exact = copy.deepcopy(model).to(F64)
    found, expected = model(x), exact(x.to(F64) if x.is_floating_point() else x)
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_of(model).parameters()} == {torch.float32}
    assert relative_difference(found.to(F64), expected) <= ROUNDING["bf16"]


@each
def test_a_saved_state_loads_bit_for_bit_into_a_model_made_anew(combination):
    model, x = combination.trained(), combination.input()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other = combination.fresh()
    other(x)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), model(x))
    for (name, ours), theirs in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@each
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same_and_are_independent(combination, clone):
    model, x = combination.trained(), combination.input()
    expected = model(x)
    made = clone(model)
    assert torch.equal(made(x), expected)
    randomize(made, std=1.0)
    assert not torch.equal(made(x), expected)
    assert torch.equal(model(x), expected)


@over(ONE_START, "fp32")
def test_it_compiles_as_one_graph(combination):
    model, x = combination.trained(), combination.input()
    torch._dynamo.reset()
    compiled = torch.compile(twin(model), backend="aot_eager", fullgraph=True)
    assert relative_difference(compiled(x), model(x)) <= 1e-6
    found, expected = gradients(compiled, x), gradients(model, x)
    for name, grad in expected.items():
        key = name if name == "x" else f"_orig_mod.{name}"
        assert relative_difference(found[key], grad) <= 1e-5, name


@each
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_activation_checkpointing(combination, reentrant):
    model, x = combination.trained(), combination.input()
    if reentrant and not x.is_floating_point():
        return  # it needs an input that requires grad, and tokens cannot
    expected = gradients(twin(model), x)
    found = gradients(model, x, lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@each
def test_a_second_adapter_comes_and_goes_and_leaves_the_first_as_it_was(combination):
    model, x = combination.trained(), combination.input()
    first = model(x)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inject(model, "0", combination.config(), name="second")
    with disabled(model):
        assert torch.equal(model(x), model[0].base_layer(x))
    randomize(model, std=0.3)
    second = model(x)
    assert not torch.equal(second, first)
    activate(model, "default")
    assert torch.equal(model(x), first)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    activate(model, "second")
    assert torch.equal(model(x), second)
    activate(model, "default")
    delete_adapter(model, "second")
    assert torch.equal(model(x), first)
    assert type(delete_adapter(model, "default")[0]) is type(model[0])


@each
def test_two_adapters_together_merge_into_what_they_compute_or_are_refused(combination):
    model, x = combination.trained(), combination.input()
    inject(model, "0", combination.config(), name="second")
    randomize(model, std=0.3)
    if not adapter_of(model).additive:
        with pytest.raises(AdapterError, match="cannot be active together on 0"):
            activate(model, "default", "second")
        return
    adapted = activate(model, "default", "second")(x)
    assert relative_difference(merge(model)(x), adapted) <= ROUNDING[combination.storage]


@each
def test_dropout_acts_in_training_alone_or_is_refused(combination):
    if combination.kind == "embedding":
        with pytest.raises(LoRAError, match="0: an embedding's input is tokens"):
            combination.fresh(dropout=0.5)
        return
    model, x = combination.trained(dropout=0.5), combination.input()
    model.train()
    assert not torch.equal(model(x), model(x))
    expected = combination.trained().eval()(x)
    assert torch.equal(model.eval()(x), expected)


@over(ONE_START, "fp32", "bf16")
def test_it_is_materialized_from_the_meta_device(combination):
    with torch.device("meta"):
        model = combination.fresh()
    assert all(p.is_meta for p in model.parameters())
    full = combination.trained()
    model = model.to_empty(device="cpu")
    model.load_state_dict(full.state_dict())
    assert torch.equal(model(combination.input()), full(combination.input()))


@each
def test_the_summary_names_the_method_and_counts_what_is_trained(combination):
    model = combination.fresh()
    (layer,) = summary(model).layers
    assert layer.method == combination.method
    assert layer.trainable == sum(p.numel() for p in adapter_of(model).parameters() if p.requires_grad) > 0


@over(REFUSED)
def test_what_cannot_be_is_refused_by_name(combination):
    said = refusal(combination)
    assert said is not None
    assert re.search(r"\b0: ", said), said


@pytest.mark.parametrize("method", METHODS)
def test_configs_are_frozen_values(method):
    config = METHODS[method](r=3)
    assert config == METHODS[method](r=3)
    assert hash(config) == hash(METHODS[method](r=3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.method == method
    assert all(hasattr(config, name) for name in config.decisive)
    with pytest.raises(AttributeError):
        config.r = 4


def test_the_documentation_has_the_table_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert table() in page, "run: python -m tests.conformance.table"
