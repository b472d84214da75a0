"""Whole-model functions over stacked weights of experts: they work, or they refuse by name."""

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    TargetError,
    VeRAConfig,
    activate,
    adapter_state_dict,
    combine,
    disabled,
    inject,
    load_adapter,
    param_groups,
    quantize,
    routed,
    save_adapter,
)
from lightning_lora.io.fingerprint import base_fingerprint
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.combining import trim
from tests.conftest import randomize, relative_difference
from tests.nn.test_experts import Mix

F64 = torch.float64


class Net(nn.Module):
    """Experts between two linear layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(8, 16), Mix(), nn.Linear(12, 6)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


X = torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
TARGETS = ["mix.up", "first"]


def adapted(ranks: dict[str, int]) -> nn.Module:
    model = Net().double()
    for index, (name, r) in enumerate(ranks.items()):
        torch.manual_seed(index)
        randomize(inject(model, TARGETS, LoRAConfig(r=r, alpha=5), name=name), std=0.3)
    return model


def updates(model: nn.Module, name: str) -> torch.Tensor:
    """``s B_e A_e`` of every expert, of shape ``(E, O, I)``."""
    adapter = adapted_layers(model)["mix.up"].adapter(name)
    return torch.stack(
        [adapter.config.scale * B @ A for A, B in zip(adapter.lora_A, adapter.lora_B, strict=True)]
    ).detach()


@pytest.mark.parametrize(("how", "ranks"), [("cat", (2, 3)), ("svd", (2, 3)), ("linear", (3, 3))])
def test_combine_weighs_the_update_of_each_expert(how, ranks):
    """Against the dense sum of each expert by itself, and the nearest matrix of its rank (Eckart and Young)."""
    model = combine(adapted(dict(zip("ab", ranks, strict=True))), {"a": 0.7, "b": -0.4}, name="new", how=how)
    exact = 0.7 * updates(model, "a") - 0.4 * updates(model, "b")
    if how != "cat":
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        exact = left[..., :3] * values[:, None, :3] @ right[:, :3]
    assert relative_difference(updates(model, "new"), exact) <= 1e-13
    assert model(X).shape == activate(model, "new")(X).shape


def test_combine_prunes_each_expert_by_itself():
    model = combine(adapted({"a": 3}), {"a": 1.0}, name="new", how="ties", density=0.2, r=12)
    for found, update in zip(updates(model, "new"), updates(model, "a"), strict=True):
        assert relative_difference(found, trim(update, 0.2)) <= 1e-13


def test_a_combined_adapter_stands_over_a_quantized_stack():
    model = Net()
    for name in ("a", "b"):
        randomize(inject(model, TARGETS, LoRAConfig(r=2), name=name), std=0.3)
    combine(quantize(model), {"a": 0.5, "b": 0.5}, name="new", how="cat")
    expected = activate(model, "a", "b", train=())(X.float())
    weights = model.mix.up.merged_weight() - model.mix.up.base_weight()
    activate(model, "new")
    assert expected.shape == model(X.float()).shape
    assert relative_difference(model.mix.up.merged_weight() - model.mix.up.base_weight(), weights / 2) <= 1e-5


def test_rows_are_not_routed_through_experts_which_is_said_by_name():
    model = adapted({"a": 2})
    with pytest.raises(AdapterError, match=r"'a' on mix\.up cannot be routed: weights of experts are read"):
        routed(model, ["a", None, None, "a", None]).__enter__()
    assert adapted_layers(model)["mix.up"].rows is None


def test_rows_are_routed_through_what_is_not_on_the_experts_and_these_compute_their_base():
    model = adapted({"a": 2})
    inject(model, "first", LoRAConfig(r=3), name="b")
    randomize(model, std=0.3)
    with routed(model, ["b", None, None, "b", None]):
        found = model(X)
    with disabled(model):
        base = model(X)
    expected = torch.where(torch.tensor([True, False, False, True, False])[:, None], activate(model, "b")(X), base)
    assert relative_difference(found, expected) <= 1e-12


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoRAConfig(r=2, init="eva"), "experts start by chance.*not with init='eva'"),
        (LoRAConfig(r=2, init="pissa"), "not with init='pissa'"),
        (LoRAConfig(r=2, init="olora"), "not with init='olora'"),
        (LoRAConfig(r=2, init="loftq"), "not with init='loftq'"),
        (DoRAConfig(r=2), "with LoRA only, not with dora"),
        (LoRAFAConfig(r=2), "with LoRA only, not with lora_fa"),
        (VeRAConfig(r=2), "with LoRA only, not with vera"),
    ],
)
def test_other_starts_and_methods_are_refused_by_name(config, said):
    model = Net()
    with pytest.raises(TargetError, match=rf"mix\.up: .*{said}"):
        inject(model, "mix.up", config)
    assert type(model.mix) is Mix


def test_lora_plus_speeds_up_the_factors_b_of_experts():
    model = inject(Net(), TARGETS, LoRAConfig(r=2))
    slow, fast = sorted(param_groups(model, lr=1.0, lr_ratio=16.0), key=lambda group: group["lr"])
    layer = model.mix.up.adapter("default")
    assert {id(layer.lora_A)} <= set(map(id, slow["params"]))
    assert {id(layer.lora_B)} <= set(map(id, fast["params"]))


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_knows_the_stack_it_was_trained_on(packed, tmp_path):
    """Its fingerprint is that of the dense parameter, also once that is gone."""
    expected = base_fingerprint({"mix.up": inject(Net(), "mix.up", LoRAConfig(r=2)).mix.up})
    model = inject(Net(), "mix.up", LoRAConfig(r=2))
    model = quantize(model) if packed else model
    assert base_fingerprint({"mix.up": model.mix.up}) == expected
    save_adapter(model, tmp_path)
    loaded = load_adapter(Net(), tmp_path)
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(adapter_state_dict(loaded)[key], tensor)
    other = Net()
    other.mix.up.data[2, 3, 4] += 1
    with pytest.raises(AdapterError, match=r"another one in mix\.up \(other values\)"):
        load_adapter(other, tmp_path)
