"""Every kind of layer applies a low-rank update as if its weight had been changed."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, inject, merge
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.kinds import kind_of
from tests.conftest import randomize, relative_difference

F64 = torch.float64


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(3))


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), values(2, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), values(5, 12)),
    "embedding": (lambda: nn.Embedding(12, 8, padding_idx=0), tokens(3, 4)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), values(2, 6, 11)),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 8, 3), values(6, 11)),
    "conv2d dilated, circular": (
        lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="circular"),
        values(2, 6, 9, 10),
    ),
    "conv1d dilated, circular": (
        lambda: nn.Conv1d(6, 8, 3, padding=2, dilation=2, padding_mode="circular"),
        values(2, 6, 11),
    ),
    "conv3d dilated, circular, in groups": (
        lambda: nn.Conv3d(4, 6, 3, padding=2, dilation=2, padding_mode="circular", groups=2),
        values(1, 4, 5, 6, 5),
    ),
    "conv2d reflected, strided": (
        lambda: nn.Conv2d(6, 8, (3, 2), 2, (1, 0), padding_mode="reflect"),
        values(2, 6, 9, 9),
    ),
    "conv2d same": (lambda: nn.Conv2d(6, 8, (3, 5), padding="same", bias=False), values(2, 6, 7, 9)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), values(2, 6, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), values(2, 6, 7, 7)),
    "conv3d replicated": (lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), values(1, 4, 5, 5, 5)),
}


@pytest.fixture(params=LAYERS)
def case(request) -> tuple[nn.Module, torch.Tensor]:
    build, x = LAYERS[request.param]
    return nn.Sequential(build().to(F64)), x


def adapted(model: nn.Module, r: int = 3) -> nn.Module:
    return randomize(inject(model, "*", LoRAConfig(r=r, alpha=5)), std=0.3)


def test_a_fresh_adapter_changes_nothing(case):
    model, x = case
    before = model(x)
    assert torch.equal(inject(model, "*", LoRAConfig(r=3))(x), before)


def test_the_adapted_layer_computes_what_the_changed_weight_does(case):
    """Against torch's own layer with ``W + s B A``, in float64; the order of summation is all that differs."""
    model, x = case
    base = model[0]
    weight = base.weight.detach().clone()
    layer = adapted(model)[0]
    adapter, kind = layer.adapter("default"), kind_of(base)
    update = 5 / 3 * adapter.lora_B @ adapter.lora_A
    found = model(x)
    with torch.no_grad():
        base.weight.copy_(kind.from_matrix(kind.to_matrix(weight) + update))
        expected = base(x)
    assert relative_difference(found, expected) <= 1e-12


def test_gradients_are_those_of_the_dense_formula(case):
    model, x = case
    base = model[0]
    layer = adapted(model)[0]
    adapter, kind = layer.adapter("default"), kind_of(base)
    if isinstance(base, nn.Embedding):
        adapter.lora_A.data[:, base.padding_idx] = 0  # where it starts, and stays
    probe = torch.randn_like(model(x))
    (model(x) * probe).sum().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    dense = kind.from_matrix(kind.to_matrix(base.weight.detach()) + 5 / 3 * B @ A)
    y = torch.func.functional_call(base, {"weight": dense}, (x,))
    (y * probe).sum().backward()
    assert relative_difference(adapter.lora_A.grad, A.grad) <= 1e-12
    assert relative_difference(adapter.lora_B.grad, B.grad) <= 1e-12
    assert base.weight.grad is None


def test_a_dilated_circular_convolution_is_the_sum_over_a_torus():
    """Against the definition, term by term: ``y[o, i, j] = b[o] + sum W'[o, c, u, v] x[c, i + 2u - 2, j + 2v - 2]``."""
    build, x = LAYERS["conv2d dilated, circular"]
    layer = adapted(nn.Sequential(build().to(F64)))[0]
    adapter, base = layer.adapter("default"), layer.base_layer
    weight = base.weight + (5 / 3 * adapter.lora_B @ adapter.lora_A).view_as(base.weight)
    expected = base.bias.view(1, -1, 1, 1).expand(2, 8, 9, 10).clone()
    for u in range(3):
        for v in range(3):  # what stands at i + 2u - 2, the axes being rings, is rolled to i
            shifted = x.roll((2 - 2 * u, 2 - 2 * v), dims=(2, 3))
            expected += torch.einsum("oc,ncij->noij", weight[:, :, u, v], shifted)
    assert relative_difference(layer(x), expected) <= 1e-12


def test_merging_gives_the_layer_back_with_the_adapted_function(case):
    model, x = case
    kind, keys = type(model[0]), list(model.state_dict())
    expected = adapted(model)(x)
    merge(model)
    assert type(model[0]) is kind
    assert list(model.state_dict()) == keys
    assert relative_difference(model(x), expected) <= 1e-12


def test_layer_attributes_stay_readable(case):
    model, _ = case
    base = model[0]
    layer = adapted(model)[0]
    assert layer.weight.shape == base.weight.shape
    assert getattr(layer, "bias", None) is getattr(base, "bias", None)
    for name in ("in_features", "stride", "padding_idx", "groups"):
        assert hasattr(layer, name) is hasattr(base, name)


def test_an_adapted_layer_without_a_base_attribute_says_so(net):
    layer = inject(net, "q_proj") and adapted_layers(net)["blocks.0.q_proj"]
    with pytest.raises(AttributeError, match="strides"):
        _ = layer.strides


@pytest.mark.parametrize("kind", ["Conv1D"])
def test_hugging_faces_transposed_linear_layer_is_a_linear_layer(kind):
    layers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(getattr(layers, kind)(8, 12), nn.Linear(8, 8)).to(F64)
    x, keys = values(5, 12), list(model.state_dict())
    inject(model, config=LoRAConfig(r=3))
    assert list(adapted_layers(model)) == ["0"]
    expected = randomize(model)(x)
    assert model[0].adapter("default").lora_A.shape == (3, 12)
    merge(model)
    assert list(model.state_dict()) == keys
    assert model[0].weight.shape == (12, 8)
    assert relative_difference(model(x), expected) <= 1e-12


def test_unseen_tokens_and_padding_stay_where_they_are():
    model = nn.Sequential(nn.Embedding(12, 8, padding_idx=0))
    before = model[0].weight.detach().clone()
    inject(model, "*", LoRAConfig(r=3))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2])).square().sum().backward()
        optimizer.step()
    after = merge(model)[0].weight
    changed = (after != before).any(dim=1)
    assert changed.tolist() == [False, True, True] + [False] * 9


@pytest.mark.parametrize(
    ("layer", "config", "said"),
    [
        (lambda: nn.Embedding(12, 8, max_norm=1.0), LoRAConfig(r=2), "max_norm=1.0 rescales its weight"),
        (lambda: nn.Embedding(12, 8), LoRAConfig(r=2, dropout=0.1), "tokens, which dropout cannot zero"),
        (lambda: nn.Conv2d(2, 3, 1), LoRAConfig(r=3), "r=3 is more than the full rank 2 of a layer 2 -> 3"),
        (lambda: nn.ConvTranspose2d(2, 3, 1), LoRAConfig(r=1), "no linear layer"),
    ],
)
def test_layers_that_cannot_be_adapted_so_say_why(layer, config, said):
    with pytest.raises(TargetError, match=said):
        inject(nn.Sequential(layer()), "0", config)
