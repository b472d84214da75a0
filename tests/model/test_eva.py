"""Adapters that start from data: directions of the layers' inputs, ranks where they explain most."""

import copy
from itertools import chain

import pytest
import torch
from torch import nn

from lightning_lora import AdapterError, LoRAConfig, disabled, initialize_eva, inject, quantize
from lightning_lora.model.eva import share
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.kinds import kind_of
from tests.conftest import Net, relative_difference
from tests.nn.test_kinds import LAYERS


class Planted(nn.Module):
    """Two layers on inputs that are known: the first varies in two directions, the second in eight alike."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Linear(32, 24)
        self.many = nn.Linear(40, 24)

    def forward(self, x):
        return self.few(x[:, :32].contiguous()) + self.many(x[:, 32:].contiguous())  # PEFT takes a view


def planted(count: int = 500) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    few = torch.linalg.qr(torch.randn(32, 2, generator=draw)).Q.T
    many = torch.linalg.qr(torch.randn(40, 8, generator=draw)).Q.T
    sizes = torch.tensor([3.0, 2.0]), torch.linspace(1.3, 0.7, 8)
    left, right = (
        (torch.randn(count, len(size), generator=draw) * size) @ basis
        for size, basis in zip(sizes, (few, many), strict=True)
    )
    return torch.cat([left, right], 1) + 0.01 * torch.randn(count, 72, generator=draw) + 5


def adapter(model: nn.Module, path: str):
    return adapted_layers(model)[path].adapter("default")


def eva(model: nn.Module, batches, r: int = 4, alpha: float = 6, scaling: str = "standard", **settings) -> nn.Module:
    inject(model, ["few", "many"], LoRAConfig(r=r, alpha=alpha, scaling=scaling, init="eva"))
    return initialize_eva(model, batches, **settings)


def test_rows_of_a_are_the_directions_of_the_inputs():
    data = planted()
    model = eva(Planted(), data.split(100), rho=1)
    for path, part in (("few", data[:, :32]), ("many", data[:, 32:])):
        _, _, Vh = torch.linalg.svd(part - part.mean(0), full_matrices=False)
        A = adapter(model, path).lora_A
        assert torch.allclose(A @ A.T, torch.eye(4), atol=1e-5)
        known = 2 if path == "few" else 4  # beyond them it is noise
        assert torch.linalg.svdvals(A[:known] @ Vh[:known].T).min() > 0.99


def test_training_starts_at_the_base_model_bit_for_bit():
    model, data = Planted(), planted()
    before = model(data)
    assert torch.equal(eva(model, data.split(100))(data), before)
    model(data).square().sum().backward()
    assert adapter(model, "few").lora_B.grad.any()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_ranks_go_where_they_explain_most_and_the_scaling_stays(scaling):
    model = eva(Planted(), planted().split(100), scaling=scaling)
    ranks = {path: adapter(model, path).config.r for path in ("few", "many")}
    assert ranks == {"few": 2, "many": 6}  # the third direction of "few" is noise; 8 in all
    for path in ranks:
        config = adapter(model, path).config
        assert config.scale == pytest.approx(LoRAConfig(r=4, alpha=6, scaling=scaling).scale, rel=1e-12)
        assert adapter(model, path).lora_A.shape[0] == adapter(model, path).lora_B.shape[1] == config.r


def test_sharing_spends_the_budget_on_the_largest_shares_and_leaves_none_without():
    shares = {"a": [0.9, 0.05, 0.04], "b": [0.3, 0.3, 0.2], "c": [0.01, 0.01, 0.01]}
    assert share(shares, 6) == {"a": 2, "b": 3, "c": 1}
    assert share(shares, 3) == {"a": 1, "b": 1, "c": 1}
    assert share(shares, 9) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.filterwarnings("ignore")
def test_directions_and_ranks_are_pefts():
    peft = pytest.importorskip("peft")
    base, data = Planted(), planted()
    batches = list(data.split(100))
    ours = eva(copy.deepcopy(base), batches * 6)  # PEFT goes round until every direction has settled
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["few", "many"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.initialize_lora_eva_weights(
        theirs,
        batches,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    for path in ("few", "many"):
        layer = theirs.base_model.model.get_submodule(path)
        found, expected = adapter(ours, path), layer.lora_A["default"].weight
        assert found.lora_A.shape == expected.shape
        assert found.config.scale == pytest.approx(layer.scaling["default"])
        # directions of nearly the same variance turn into each other; the space they span is what counts
        assert torch.linalg.svdvals(found.lora_A @ expected.T).min() > 0.98


def test_inputs_of_every_kind_are_what_the_weight_is_multiplied_with():
    """phi(x) W^T is the layer's output, for every kind that has a matrix view of its inputs."""
    for name, (build, x) in LAYERS.items():
        layer = build().to(torch.float64)
        if name == "embedding":
            continue
        kind = kind_of(layer)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
        groups = getattr(layer, "groups", 1)
        rows, weight = kind.features(x).reshape(-1, groups, kind.in_features), kind.to_matrix(layer.weight)
        found = torch.einsum("ngi,goi->ngo", rows, weight.reshape(groups, -1, kind.in_features)).flatten(1)
        y = layer(x)
        expected = y.movedim(-1 - getattr(kind, "axes", 0), -1).reshape(-1, kind.out_features)
        assert relative_difference(found, expected) <= 1e-12, name


@pytest.mark.parametrize("quantized", [False, True])
def test_convolutions_and_quantized_layers_start_from_data_too(quantized):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 8))
    x = torch.randn(64, 3, 4, 4)
    inject(model, "*", LoRAConfig(r=2, init="eva"))
    if quantized:
        quantize(model)
    with disabled(model):
        before = model(x)
    initialize_eva(model, [x])
    assert torch.equal(model(x), before)
    assert sum(layer.adapter("default").config.r for layer in adapted_layers(model).values()) == 4


def test_padding_and_ignored_positions_are_left_out():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask=None, labels=None):
            return self.few(input_ids)

    draw = torch.Generator().manual_seed(2)
    x = torch.randn(20, 6, 8, generator=draw)
    mask = torch.rand(20, 6, generator=draw) < 0.7
    labels = torch.where(torch.rand(20, 6, generator=draw) < 0.8, 1, -100)
    spoiled = torch.where((mask & (labels != -100))[..., None], x, 1e3 * torch.randn(20, 6, 8, generator=draw))
    starts = []
    for batch in (
        {"input_ids": x[mask & (labels != -100)]},
        {"input_ids": spoiled, "attention_mask": mask.long(), "labels": labels},
    ):
        torch.manual_seed(0)
        model = inject(Tokens(), "few", LoRAConfig(r=3, init="eva"))
        starts.append(adapter(initialize_eva(model, [batch]), "few").lora_A)
    assert torch.equal(*starts)


def test_it_stops_once_the_directions_have_settled():
    batch = planted()
    taken = []

    def batches():
        for index in range(50):
            taken.append(index)
            yield batch

    eva(Planted(), batches(), rho=1, r=2)
    assert len(taken) <= 5


def test_the_model_is_left_as_it_was_but_for_the_adapters():
    model = nn.ModuleDict({"few": nn.Linear(32, 24), "norm": nn.BatchNorm1d(24), "drop": nn.Dropout(0.5)}).train()
    model["norm"].eval()
    state = copy.deepcopy(model.state_dict())
    inject(model, "few", LoRAConfig(r=2, init="eva"))

    def forward(model, batch):
        assert not model.training
        return model["drop"](model["norm"](model["few"](batch[:, :32])))

    initialize_eva(model, [planted()], forward=forward)
    assert model.training
    assert not model["norm"].training
    assert model["few"].adapters.training
    after = model.state_dict()
    assert all(
        torch.equal(after.get(key, after.get(key.replace("few.", "few.base_layer."))), t) for key, t in state.items()
    )
    assert not model["few"].base_layer._forward_pre_hooks
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["few.adapters.default.lora_A", "few.adapters.default.lora_B"]


@pytest.mark.parametrize(
    ("batches", "settings", "error", "said"),
    [
        ([planted(6)], {}, ValueError, r"too few inputs have reached few \(6 of 9\), many \(6 of 9\)"),
        ([], {}, ValueError, r"too few inputs have reached few \(0 of 9\)"),
        ([planted() / 0], {}, ValueError, "the input of few holds NaN or infinity"),
        ([planted()], {"rho": 0.5}, ValueError, "rho must be at least 1"),
        ([planted()], {"tau": 2}, ValueError, "tau between 0 and 1"),
        ([planted()], {"name": "other"}, AdapterError, "no adapter 'other'"),
    ],
)
def test_what_cannot_be_done_is_said(batches, settings, error, said):
    model = Planted()
    inject(model, ["few", "many"], LoRAConfig(r=4, init="eva"))
    with pytest.raises(error, match=said):
        initialize_eva(model, batches, **settings)
    assert not adapter(model, "few").started


def test_an_adapter_of_another_start_is_refused():
    with pytest.raises(AdapterError, match=r"does not start from data.*init='eva'"):
        initialize_eva(inject(Net(), config=LoRAConfig(r=2)), [])


def test_only_the_layers_that_ask_for_it_start_from_data():
    model = Planted()
    inject(model, {"few": LoRAConfig(r=4, init="eva"), "many": LoRAConfig(r=4, init="pissa")})
    start = adapter(model, "many").lora_A.clone()
    initialize_eva(model, chain([planted()], [planted()]))
    assert torch.equal(adapter(model, "many").lora_A, start)
    assert adapter(model, "few").config.r == 4
