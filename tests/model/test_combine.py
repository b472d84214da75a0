"""Combining adapters: against dense sums in float64, the published algorithms, and PEFT."""

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    activate,
    adapter_state_dict,
    combine,
    inject,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.model.layers import adapted_layers, adapter_names
from lightning_lora.nn.combining import trim
from lightning_lora.nn.vera import VeRAConfig
from tests.conftest import Net, randomize, relative_difference
from tests.nn.test_kinds import LAYERS

F64 = torch.float64
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}
HOWS = {"linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.4}, "dare_linear": {"density": 0.4}}
HOWS["dare_ties"] = HOWS["dare_linear"]


def with_adapters(model: nn.Module, configs: dict[str, LoRAConfig], targets: str | dict = "*") -> nn.Module:
    for name, config in configs.items():
        inject(model, targets[name] if isinstance(targets, dict) else targets, config, name=name)
        randomize(model, std=0.3)
    return model


def three(dtype: torch.dtype = F64) -> nn.Module:
    """Two linear layers with adapters of different ranks, scalings and target sets."""
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 14)).to(dtype)
    configs = {
        "a": LoRAConfig(r=2, alpha=3),
        "b": LoRAConfig(r=3, alpha=1),
        "c": LoRAConfig(r=4, alpha=5, scaling="rslora"),
    }
    return with_adapters(model, configs, {"a": "*", "b": "0", "c": "*"})


def update(layer: nn.Module, name: str) -> torch.Tensor:
    if name not in layer.adapters:
        return torch.zeros(layer.kind.out_features, layer.kind.in_features, dtype=F64)
    adapter = layer.adapter(name)
    return adapter.config.scale * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()


def dense_sum(layer: nn.Module, weights: dict[str, float]) -> torch.Tensor:
    return sum(weight * update(layer, name) for name, weight in weights.items())


def best_of_rank(matrix: torch.Tensor, r: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :r] * values[:r] @ right[:r]


def test_cat_is_the_weighted_sum_for_any_ranks_scalings_and_targets():
    model = combine(three(), WEIGHTS, name="new", how="cat")
    for layer, rank in zip(adapted_layers(model).values(), (9, 6), strict=True):
        assert relative_difference(update(layer, "new"), dense_sum(layer, WEIGHTS)) <= 1e-13
        assert layer.adapter("new").config.r == rank


@pytest.mark.parametrize("r", [1, 3, 5, 40])
def test_svd_is_the_nearest_matrix_of_its_rank(r):
    """Its distance is the Eckart-Young bound: the singular values left out."""
    model = combine(three(), WEIGHTS, name="new", how="svd", r=r)
    for layer in adapted_layers(model).values():
        total = dense_sum(layer, WEIGHTS)
        bound = torch.linalg.svdvals(total)[r:].square().sum().sqrt().item()
        assert (update(layer, "new") - total).norm().item() == pytest.approx(bound, rel=1e-10, abs=1e-12)
        assert layer.adapter("new").config.r == min(r, 9 if "b" in layer.adapters else 6)


def test_svd_without_a_rank_takes_the_largest_on_each_layer():
    model = combine(three(), {"a": 1, "b": 1}, name="new", how="svd")
    assert [layer.adapter("new").config.r for layer in adapted_layers(model).values()] == [3, 2]


def test_linear_is_exact_where_the_sum_has_the_rank_of_its_parts():
    """One adapter on a layer, and adapters that share a factor."""
    config = LoRAConfig(r=3, alpha=2)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 14)).to(F64)
    with_adapters(model, {"a": config, "b": config}, {"a": "0", "b": "*"})
    model[0].adapter("a").lora_A.data.copy_(model[0].adapter("b").lora_A)
    weights = {"a": 0.7, "b": -0.4}
    combine(model, weights, name="new")
    for layer in adapted_layers(model).values():
        assert relative_difference(update(layer, "new"), dense_sum(layer, weights)) <= 1e-13
        assert layer.adapter("new").config.r == 3


def test_linear_is_else_the_nearest_of_that_rank_and_refuses_unequal_ranks():
    config = LoRAConfig(r=3, alpha=2)
    model = with_adapters(nn.Sequential(nn.Linear(16, 12)).to(F64), {"a": config, "b": config})
    weights = {"a": 0.7, "b": -0.4}
    expected = best_of_rank(dense_sum(model[0], weights), 3)
    assert relative_difference(update(combine(model, weights, name="new")[0], "new"), expected) <= 1e-13
    with pytest.raises(AdapterError, match=r"0: how='linear' keeps the rank, and these are 2 \(a\), 3 \(b\)"):
        combine(three(), {"a": 1, "b": 1}, name="new")


def test_ties_is_the_published_algorithm():
    """Yadav et al., algorithm 1, element by element: trim, elect, average those that agree."""
    model = combine(three(), {"a": 1, "b": 1, "c": 1}, name="new", how="ties", density=0.3, r=12)
    tasks = []
    for name in "abc":
        task = update(model[0], name)
        threshold = task.abs().flatten().sort(descending=True).values[round(0.3 * task.numel()) - 1]
        tasks.append(torch.where(task.abs() >= threshold, task, 0.0))
    expected = torch.zeros_like(tasks[0])
    for index in range(expected.numel()):
        values = [task.flatten()[index].item() for task in tasks]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        expected.view(-1)[index] = sum(agreeing) / max(1, len(agreeing))
    assert relative_difference(update(model[0], "new"), expected) <= 1e-12


def test_dare_keeps_the_expected_update_and_obeys_its_generator():
    model = with_adapters(nn.Sequential(nn.Linear(16, 12)).to(F64), {"a": LoRAConfig(r=2), "b": LoRAConfig(r=2)})
    weights = {"a": 0.7, "b": -0.4}
    draw = torch.Generator().manual_seed(1)
    found = []
    for index in range(400):
        combine(model, weights, name=f"d{index}", how="dare_linear", density=0.5, r=12, generator=draw)
        found.append(update(model[0], f"d{index}"))
    total = dense_sum(model[0], weights)
    # Each element has a standard deviation of at most its parts' size; 400 draws leave a twentieth, and 5 sigma is 1/4.
    spread = (0.7 * update(model[0], "a")).abs() + (0.4 * update(model[0], "b")).abs()
    assert ((torch.stack(found).mean(0) - total).abs() <= 0.25 * spread + 1e-12).all()
    assert not torch.equal(found[0], found[1])
    again = combine(
        model, weights, name="again", how="dare_linear", density=0.5, r=12, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(update(again[0], "again"), found[0])


@pytest.mark.parametrize("how", ["cat", "svd", "ties_svd"])
def test_the_update_is_the_one_peft_makes(how):
    """In float32, of values that PEFT's dense products and ours sum in another order: 1e-5."""
    peft = pytest.importorskip("peft")
    configs = {"one": LoRAConfig(r=3, alpha=2), "two": LoRAConfig(r=3, alpha=32)}
    model = with_adapters(nn.Sequential(nn.Linear(16, 12)), configs)
    theirs = [peft.LoraConfig(r=3, lora_alpha=config.alpha, target_modules=["0"]) for config in configs.values()]
    other = peft.get_peft_model(nn.Sequential(nn.Linear(16, 12)), theirs[0], adapter_name="one")
    other.add_adapter("two", theirs[1])
    layer = other.base_model.model[0]
    with torch.no_grad():
        for name in configs:
            layer.lora_A[name].weight.copy_(model[0].adapter(name).lora_A)
            layer.lora_B[name].weight.copy_(model[0].adapter(name).lora_B)
    extra = {"density": 0.375} if "_" in how else {}  # 72 of 192 elements, however one rounds
    other.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type=how, **extra)
    combine(model, {"one": 0.7, "two": -0.4}, name="sum", how=how.removesuffix("_svd"), **extra)
    expected = layer.get_delta_weight("sum").detach()
    assert relative_difference(update(model[0], "sum").float(), expected) <= 1e-5


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_is_pefts_on_the_updates_for_the_same_draws(how):
    merging = pytest.importorskip("peft.utils.merge_utils")
    model = with_adapters(nn.Sequential(nn.Linear(16, 12)), {"a": LoRAConfig(r=3, alpha=2), "b": LoRAConfig(r=3)})
    tasks = [update(model[0], name).float() for name in "ab"]
    torch.manual_seed(7)  # on the CPU a generator of its own gives the same stream
    expected = getattr(merging, how)(tasks, torch.tensor([0.7, -0.4]), 0.4)
    draw = torch.Generator().manual_seed(7)
    combine(model, {"a": 0.7, "b": -0.4}, name="new", how=how, density=0.4, r=12, generator=draw)
    assert relative_difference(update(model[0], "new").float(), expected) <= 1e-5  # float32 singular vectors


def test_linear_comes_nearer_to_the_sum_than_peft_does():
    """PEFT adds the factors, weighted by the roots: a formula from its documentation, written out here."""
    config = LoRAConfig(r=3, alpha=3)
    model = with_adapters(nn.Sequential(nn.Linear(16, 12)).to(F64), {"a": config, "b": config})
    weights = {"a": 0.7, "b": 0.4}
    total = dense_sum(model[0], weights)
    factors = {name: model[0].adapter(name) for name in weights}
    theirs = sum(w**0.5 * factors[n].lora_B for n, w in weights.items()) @ sum(
        w**0.5 * factors[n].lora_A for n, w in weights.items()
    )
    ours = update(combine(model, weights, name="new")[0], "new")
    assert (ours - total).norm() < 0.7 * (theirs - total).norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_computes_the_weighted_sum(kind):
    build, x = LAYERS[kind]
    model = with_adapters(nn.Sequential(build().to(F64)), {"a": LoRAConfig(r=2, alpha=3), "b": LoRAConfig(r=3)})
    outputs = {name: activate(model, name)(x) for name in "ab"}
    base = activate(model)(x)
    expected = base + 0.7 * (outputs["a"] - base) - 0.4 * (outputs["b"] - base)
    combine(model, {"a": 0.7, "b": -0.4}, name="new", how="cat")
    found = activate(model, "new")(x)
    assert relative_difference(found, expected) <= 1e-12
    assert relative_difference(merge(model)(x), expected) <= 1e-12


@pytest.mark.parametrize("how", HOWS)
def test_over_nf4_the_adapters_are_combined_and_the_base_is_left(net, tokens, how):
    with_adapters(net, {"a": LoRAConfig(r=2), "b": LoRAConfig(r=2)}, "all-linear")
    quantize(net)
    base = activate(net)(tokens)
    codes = {key: value.clone() for key, value in net.state_dict().items() if "codes" in key}
    combine(net, {"a": 0.5, "b": 0.5}, name="new", how=how, **HOWS[how])
    assert torch.equal(net(tokens), base)
    assert not torch.equal(activate(net, "new")(tokens), base)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in codes.items())


def test_more_ranks_than_a_layer_has_are_brought_down_to_its_full_rank():
    model = with_adapters(nn.Sequential(nn.Linear(4, 3)).to(F64), {"a": LoRAConfig(r=2), "b": LoRAConfig(r=3)})
    weights = {"a": 1, "b": -2}
    combine(model, weights, name="new", how="cat")
    assert model[0].adapter("new").config.r == 3
    assert relative_difference(update(model[0], "new"), dense_sum(model[0], weights)) <= 1e-13


def test_the_new_adapter_is_frozen_and_computes_nothing_until_it_is_activated(net, tokens):
    with_adapters(net, {"a": LoRAConfig(r=2), "b": LoRAConfig(r=2)}, {"a": "q_proj", "b": "up_proj"})
    before, state = net(tokens), torch.get_rng_state()
    combine(net, {"a": 1, "b": 1}, name="new")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net(tokens), before)
    new = [p for layer in adapted_layers(net).values() for p in layer.adapter("new").parameters()]
    assert not any(p.requires_grad for p in new)
    activate(net, "new")
    assert all(p.requires_grad for p in new)


def test_a_sum_of_disjoint_adapters_is_both_at_once(net, tokens):
    with_adapters(net, {"a": LoRAConfig(r=2), "b": LoRAConfig(r=2)}, {"a": "q_proj", "b": "up_proj"})
    both = activate(net, "a", "b")(tokens)
    combine(net, {"a": 1, "b": 1}, name="new")
    assert relative_difference(activate(net, "new")(tokens), both) <= 1e-5  # float32, other factors of one product


def test_a_combined_adapter_is_saved_and_loaded_as_any_other(net, tokens, tmp_path):
    inject(net, "q_proj", LoRAConfig(r=2), name="a", train="head")
    randomize(net)
    inject(net, {"q_proj": LoRAConfig(r=3), "up_proj": LoRAConfig(r=2)}, name="b")
    randomize(net)
    combine(net, {"a": 0.5, "b": 2}, name="new", how="cat")
    assert "base_model.model.head.weight" in adapter_state_dict(net, "new")
    save_adapter(net, tmp_path / "new", name="new")
    expected = activate(net, "new")(tokens)
    torch.manual_seed(0)
    other = load_adapter(Net(), tmp_path / "new")
    with torch.no_grad():
        other.head.load_state_dict(net.head.state_dict())
        other.embed.load_state_dict(net.embed.state_dict())
    assert relative_difference(other(tokens), expected) <= 1e-5


def test_trimming_keeps_the_largest_share():
    matrix = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    assert trim(matrix, 0.5).tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    assert torch.equal(trim(matrix, 1), matrix)
    assert trim(matrix, 0.01).count_nonzero() == 1


@pytest.mark.parametrize(
    ("weights", "arguments", "error", "said"),
    [
        ({"a": 1, "z": 1}, {"how": "cat"}, AdapterError, "no adapter 'z'; this model has: a, b, c"),
        ({"a": 1}, {"name": "b"}, AdapterError, "already holds an adapter 'b'"),
        ({"a": 1}, {"name": "a.b"}, AdapterError, "adapter name 'a.b' must be"),
        ({}, {}, ValueError, "weights must map names"),
        (["a"], {}, ValueError, "weights must map names"),
        ({"a": float("nan")}, {}, ValueError, "the weight of 'a' must be a finite number, got nan"),
        ({"a": "1"}, {}, ValueError, "the weight of 'a' must be a finite number"),
        ({"a": 1}, {"how": "mean"}, ValueError, "how must be one of linear, cat, svd"),
        ({"a": 1}, {"how": "cat", "r": 3}, ValueError, "how='cat' takes no r; it is for svd, ties"),
        ({"a": 1}, {"how": "svd", "r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
        ({"a": 1}, {"how": "svd", "density": 0.2}, ValueError, "how='svd' takes no density"),
        ({"a": 1}, {"how": "ties"}, ValueError, "how='ties' needs density"),
        ({"a": 1}, {"how": "ties", "density": 1.2}, ValueError, "needs density"),
        ({"a": 1}, {"how": "ties", "density": 0.2, "generator": torch.Generator()}, ValueError, "takes no generator"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_nothing_changes(weights, arguments, error, said):
    model = three()
    with pytest.raises(error, match=said):
        combine(model, weights, **{"name": "new", **arguments})
    assert adapter_names(model) == ("a", "b", "c")


def test_an_adapter_that_holds_nan_is_named_and_nothing_changes():
    model = three()
    model[1].adapter("c").lora_A.data[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="adapter 'c' on 1 holds NaN"):
        combine(model, {"a": 1, "c": 1}, name="new", how="cat")
    assert adapter_names(model) == ("a", "b", "c")


def test_a_method_other_than_lora_is_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 12))
    inject(model, "*", VeRAConfig(), name="v")
    with pytest.raises(AdapterError, match="adapter 'v' on 0 is vera, and only LoRA"):
        combine(model, {"v": 1}, name="new")
