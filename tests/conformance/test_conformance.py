"""The promises that every combination of method, start, kind of layer and storage keeps.

What depends on the start, on the kind and on how they meet runs over all of them: the output at the start and after,
its gradients, and the merge. What an adapter does as a module (states, copies, checkpointing, a second adapter) does
not depend on the start but through the tensors it keeps, so it runs over every method, kind and storage with one start,
and over every other start on a linear layer, dense and quantized.
"""

import copy
import io
import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    AdapterError,
    LoRAError,
    TargetError,
    activate,
    delete_adapter,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    summary,
)
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import dense_weight
from lightning_lora.nn.init import INITIALIZERS
from tests.conformance.combinations import (
    KINDS,
    SAMPLED,
    Combination,
    every_combination,
    first_of,
    refusal,
    twin,
)
from tests.conformance.formulas import FORMULAS
from tests.conformance.table import tables
from tests.conftest import randomize, relative_difference

F64 = torch.float64
LINEAR = {"linear", "transposed linear", "attention"}
EXPERTS = {"experts", "transposed experts"}
QUANTIZABLE = {"linear", "attention", *EXPERTS}


def is_forbidden(c: Combination) -> bool:
    """What the package has to refuse, said independently of it."""
    by_chance = c.init is None or c.init in INITIALIZERS
    return any(
        (
            c.storage == "nf4" and c.kind not in QUANTIZABLE,
            c.kind in EXPERTS and not (c.method == "lora" and by_chance),
            c.method == "lora_fa" and c.kind == "embedding",
            c.method == "vera" and c.kind not in LINEAR,
            not by_chance and (c.method != "lora" or c.kind == "embedding"),
            c.init == "loftq" and c.storage != "nf4",
        )
    )


EVERY = list(every_combination())
READY = [storage for storage in SAMPLED if storage != "nf2"]
"""Storages for any start."""
PLAIN = [c for c in EVERY if c.kind == "linear" and c.storage == "nf4" and c.init in (None, "kaiming")]
"""One of each method."""
SAMPLES = [
    *(Combination("lora", "linear", storage, "kaiming") for storage in READY),
    *(replace(c, storage=storage) for c, storage in zip(PLAIN, cycle(READY), strict=False) if c.method != "lora"),
    Combination("lora", "linear", "nf2", "loftq"),
    Combination("lora", "linear", "int8", "pissa"),
    Combination("lora", "attention", "nf3", "kaiming"),
]
"""Of the storages beside NF4: each alone, and each method over one of them."""
ALLOWED = [*(c for c in EVERY if not is_forbidden(c)), *SAMPLES]
REFUSED = [c for c in EVERY if is_forbidden(c)]
ZERO_UPDATE = {None, "kaiming", "gaussian", "eva"}
"""Starts at which a factor is zero."""

ROUNDING = {"fp32": 1e-5, "bf16": 2**-6, "nf4": 1e-5, **dict.fromkeys(SAMPLED, 1e-5)}
"""Relative. Sums of at most 64 products of float32; or four roundings to bf16, of 2^-8 each."""


def over(combinations: Iterable[Combination], *storages: str) -> pytest.MarkDecorator:
    """Run a test over the combinations, of these storages alone if any are given."""
    chosen = [c for c in combinations if not storages or c.storage in storages]
    return pytest.mark.parametrize("combination", [pytest.param(c, id=str(c)) for c in chosen])


ONE_START = [c for c in ALLOWED if c.init in (None, "kaiming")]
OTHER_STARTS = [c for c in ALLOWED if c.method == "lora" and c.kind == "linear" and c not in ONE_START]
every, each = over(ALLOWED), over([*ONE_START, *OTHER_STARTS])


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
    if combination.init == "orthogonal":
        assert relative_difference(found, expected) <= ROUNDING[combination.storage]
    else:  # a start that is part of the weight is taken off again, bit for bit
        assert torch.equal(found, expected)
    if not combination.quantized:
        assert relative_difference(found, combination.base()(x)) <= ROUNDING[combination.storage]


@over([c for c in ALLOWED if c.init not in ZERO_UPDATE], "nf4")
def test_a_quantized_start_is_no_farther_from_the_dense_weight_than_plain_quantization(combination):
    def error(init: str) -> list[float]:
        layers = adapted_layers(combination.beside(init).fresh())
        return [torch.linalg.norm(layers[path].merged_weight() - W).item() for path, W in dense.items()]

    dense = {
        path: layer.base_weight()
        for path, layer in adapted_layers(combination.beside("kaiming").add(combination.base())).items()
    }
    for found, plain in zip(error(combination.init), error("kaiming"), strict=True):
        assert found <= plain * (1 + 1e-6)  # the norm of float32 differences
        assert combination.init != "loftq" or found < plain


@over(ALLOWED, "fp32", "nf4", *SAMPLED)
def test_output_and_gradients_are_those_of_the_dense_formula(combination):
    """In float64, also over NF4, where the formula is of the dequantized weight."""
    model, x = combination.trained(F64), combination.input(F64)
    found, output = gradients(model, x), model(x)
    plain, leaves, weights = combination.base(F64).requires_grad_(False), {}, {}
    for path, layer in adapted_layers(model).items():
        adapter = layer.adapter("default")
        W = adapter.kind.to_matrix(dense_weight(layer.base_layer, F64))
        t = {name: value.detach().clone().requires_grad_() for name, value in adapter.named_parameters()}
        leaves |= {f"{path}.adapters.default.{name}": (t[name], p) for name, p in adapter.named_parameters()}
        t |= {name: value.detach() for name, value in adapter.named_buffers()}
        weights[path] = adapter.kind.from_matrix(FORMULAS[combination.method](W, t, adapter.config))
    changed = KINDS[combination.kind].parameters(weights)

    def run(_: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(plain, changed, (x,))

    expected = gradients(plain, x, run)
    expected |= {name: leaf.grad for name, (leaf, parameter) in leaves.items() if parameter.requires_grad}
    assert relative_difference(output, run(plain, x)) <= 1e-12
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_difference(found[name], grad) <= 1e-12, name


@every
def test_gradients_reach_every_trained_parameter_and_no_other(combination):
    model = combination.trained()
    reached = {name for name in gradients(model, combination.input()) if name != "x"}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in name for name in reached)


@every
def test_the_merged_layer_computes_the_adapted_function(combination):
    model, x = combination.trained(), combination.input()
    base, adapted = combination.base(), model(x)
    merged = merge(model)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert relative_difference(merged(x), adapted) <= ROUNDING[combination.storage]


@over(ONE_START, "bf16")
def test_half_precision_is_near_the_same_function_in_double(combination):
    model, x = combination.trained(), combination.input()
    exact = copy.deepcopy(model).to(F64)
    found, expected = model(x), exact(x.to(F64) if x.is_floating_point() else x)
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in first_of(model).adapters.parameters()} == {torch.float32}
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


FOLDERS = [c for c in (*ONE_START, *OTHER_STARTS) if c.method == "lora" and c.init != "loftq"]


@over([c for c in FOLDERS if c.init in ZERO_UPDATE or not c.quantized])
def test_a_saved_folder_gives_the_same_function_over_the_base(combination, tmp_path):
    """Bit for bit; what started in the weight is written as twice the rank, and over NF4 stood on another base."""
    model, x = combination.trained(), combination.input()
    if combination.kind == "conv2d":
        with pytest.raises(AdapterError, match="0 is a convolution in 2 groups"):
            save_adapter(model, tmp_path)
        return
    save_adapter(model, tmp_path)
    loaded = load_adapter(combination.base(), tmp_path)
    loaded = combination.stored(loaded)
    if combination.init in ZERO_UPDATE:
        assert torch.equal(loaded(x), model(x))
    else:
        assert relative_difference(loaded(x), model(x)) <= ROUNDING[combination.storage]


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


COMPILED = [c for c in ONE_START if c.kind != "attention" or c.method == "lora"]
"""A projection is a linear layer; and of the other starts those alone that compute something else."""


@over([*COMPILED, *(c for c in OTHER_STARTS if c.init == "pissa")], "fp32")
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


def with_second(combination: Combination, model: nn.Module) -> nn.Module:
    """Put a second adapter in; what is fitted to the quantizing of the base comes too late for that."""
    if combination.init != "loftq":
        return combination.add(model, "second")
    with pytest.raises(TargetError, match="is quantized already, so its base cannot be fitted"):
        combination.add(model, "second")
    return combination.beside("kaiming").add(model, "second")


@each
def test_a_second_adapter_comes_and_goes_and_leaves_the_first_as_it_was(combination):
    model, x = combination.trained(), combination.input()
    first, kinds = model(x), [type(module) for module in combination.base().modules()]
    with disabled(model):
        base = model(x)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with_second(combination, model)
    for layer in adapted_layers(model).values():
        shapes = [[p.shape for p in adapter.parameters()] for adapter in layer.adapters.values()]
        assert shapes[0] == shapes[1]
    with disabled(model):
        assert torch.equal(model(x), base)
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
    if first_of(model).base_lacks is not None:
        with pytest.raises(AdapterError, match="quantized without what adapter 'default' starts with"):
            delete_adapter(model, "default")
        return
    delete_adapter(model, "default")
    assert relative_difference(model(x), base) <= ROUNDING[combination.storage]  # attention computes in another order
    if not combination.quantized:
        assert [type(module) for module in model.modules()] == kinds


@each
def test_two_adapters_together_merge_into_what_they_compute_or_are_refused(combination):
    model, x = combination.trained(), combination.input()
    with_second(combination, model)
    randomize(model, std=0.3)
    if not first_of(model).adapter("default").additive:
        with pytest.raises(AdapterError, match=r"cannot be active together on 0"):
            activate(model, "default", "second")
        return
    adapted = activate(model, "default", "second")(x)
    assert relative_difference(merge(model)(x), adapted) <= ROUNDING[combination.storage]


@each
def test_dropout_acts_in_training_alone_or_is_refused(combination):
    said = {"embedding": "0: an embedding's input is tokens", "experts": "0.up: the inputs of experts are out of reach"}
    said["transposed experts"] = said["experts"]
    if combination.kind in said:
        with pytest.raises(LoRAError, match=said[combination.kind]):
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


@over([c for c in EVERY if c.init in {"pissa", "pissa_niter_4", "olora"} and c.kind == "linear"], "fp32")
def test_a_start_in_the_weight_is_refused_where_there_is_none_yet(combination):
    with torch.device("meta"), pytest.raises((TargetError, ValueError), match=f"init='{combination.init}' starts from"):
        combination.fresh()


@each
def test_the_summary_names_the_method_and_counts_what_is_trained(combination):
    model = combination.fresh()
    layers = adapted_layers(model)
    for row in summary(model).layers:
        assert row.method == combination.method
        adapter = layers[row.name].adapter("default")
        assert row.trainable == sum(p.numel() for p in adapter.parameters() if p.requires_grad) > 0
    assert {row.name for row in summary(model).layers} == set(KINDS[combination.kind].paths)


@over(REFUSED)
def test_what_cannot_be_is_refused_by_name(combination):
    """By the layer's, or by the start's where no layer could have it."""
    said = refusal(combination)
    assert said is not None
    assert re.search(rf"\b0[.\w]*: |init='{combination.init}'", said), said


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
    for table in tables():
        assert table in page, "run: python -m tests.conformance.table"
