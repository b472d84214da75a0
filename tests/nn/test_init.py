"""Starts that come from the base weight: what they are, that training begins at the base, and that the base stays."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    TargetError,
    inject,
    merge,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.decompose import without
from lightning_lora.nn.kinds import kind_of
from tests.conftest import randomize, relative_difference

F64 = torch.float64
IN_WEIGHT = ["pissa", "pissa_niter_4", "olora"]
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 7, 7)),
}


def adapted(layer: nn.Module, init: str, r: int = 2, **settings) -> nn.Module:
    """``s = 5 / 2``, so that a forgotten factor shows."""
    return inject(nn.Sequential(layer), "*", LoRAConfig(r=r, alpha=5, init=init, **settings))


@pytest.fixture(params=LAYERS)
def layer(request) -> tuple[nn.Module, torch.Tensor]:
    build, shape = LAYERS[request.param]
    return build(), torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", IN_WEIGHT)
def test_training_starts_at_the_base_model_bit_for_bit(layer, init, dtype):
    base, x = layer[0].to(dtype), layer[1].to(dtype)
    before = base(x)
    model = adapted(base, init)
    assert model[0].adapter("default").lora_B.any()
    assert torch.equal(model(x), before)
    assert torch.equal(model[0].weight, base.weight)


def test_orthogonal_factors_are_not_zero_and_their_product_is(layer):
    base, x = layer
    before = base(x)
    model = adapted(base, "orthogonal")
    adapter = model[0].adapter("default")
    assert adapter.lora_A.any()
    assert adapter.lora_B.any()
    # R/2 products in float32 that cancel in pairs: the sum is rounding alone
    assert relative_difference(model(x), before) <= 1e-6


def test_orthogonal_values_have_the_spread_of_their_definition():
    adapter = adapted(nn.Linear(4096, 4096), "orthogonal", r=16)[0].adapter("default")
    # an orthonormal combination of R/2 standard normals is normal with variance R/2 / R = 1/2
    for factor in (adapter.lora_A, adapter.lora_B):
        assert factor.std().item() == pytest.approx(math.sqrt(0.5) / 10, rel=0.05)


def test_pissa_starts_in_the_nearest_matrix_of_its_rank(layer):
    base, _ = layer
    adapter = adapted(base.to(F64), "pissa")[0].adapter("default")
    matrix = kind_of(base).to_matrix(base.weight.detach())
    start = 5 / 2 * adapter.lora_B @ adapter.lora_A
    singular = torch.linalg.svdvals(matrix)
    assert torch.linalg.norm(matrix - start).item() == pytest.approx(singular[2:].norm().item(), rel=1e-12)
    # the singular values are shared evenly
    assert torch.allclose(adapter.lora_A.norm(dim=1), adapter.lora_B.norm(dim=0), rtol=1e-12)


def test_randomized_pissa_is_nearly_as_good_and_reproducible():
    base = nn.Linear(300, 200)
    exact, *found = (
        adapted(copy.deepcopy(base), init, r=8)[0].adapter("default")
        for init in ["pissa", "pissa_niter_4", "pissa_niter_4"]
    )
    assert torch.equal(found[0].lora_A, found[1].lora_A)
    errors = [without(base.weight.detach(), (a.lora_A, a.lora_B), 5 / 8).norm().item() for a in (exact, found[0])]
    # a flat random spectrum, the hardest case; four iterations come within a percent of the optimum
    assert errors[0] < errors[1] < 1.01 * errors[0]


def test_olora_starts_in_the_first_columns_of_a_qr_decomposition(layer):
    base, _ = layer
    adapter = adapted(base.to(F64), "olora")[0].adapter("default")
    matrix = kind_of(base).to_matrix(base.weight.detach())
    assert torch.allclose(adapter.lora_B.T @ adapter.lora_B, torch.eye(2, dtype=F64), atol=1e-12)
    assert torch.allclose(adapter.lora_B @ adapter.lora_A[:, :2], matrix[:, :2], atol=1e-12)
    assert (adapter.lora_A.diagonal() > 0).all()


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_signs_do_not_depend_on_the_decomposition(init):
    """A weight and its negative have the same factors up to the sign of one of them."""
    weight = torch.randn(12, 12)
    factors = []
    for sign in (1, -1):
        base = nn.Linear(12, 12)
        base.weight.data = sign * weight
        factors.append(adapted(base, init)[0].adapter("default"))
    assert torch.allclose(factors[0].lora_A, factors[1].lora_A, atol=1e-5)
    assert torch.allclose(factors[0].lora_B, -factors[1].lora_B, atol=1e-5)


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_output_and_gradients_equal_the_closed_form(layer, init):
    """Against torch's own layer with ``W + s (B A - B0 A0)``, in float64."""
    base, x = layer[0].to(F64), layer[1].to(F64)
    model = adapted(base, init)
    adapter, kind = model[0].adapter("default"), kind_of(base)
    A0, B0 = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    randomize(model, std=0.3)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    dense = kind.from_matrix(kind.to_matrix(base.weight.detach()) + 5 / 2 * (B @ A - B0 @ A0))
    expected = torch.func.functional_call(base, {"weight": dense}, (x,))
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    (model(x) * probe).sum().backward()
    assert relative_difference(model(x), expected) <= 1e-12
    assert relative_difference(adapter.lora_A.grad, A.grad) <= 1e-12
    assert relative_difference(adapter.lora_B.grad, B.grad) <= 1e-12
    merge(model)
    assert relative_difference(model(x), expected) <= 1e-12


@pytest.mark.parametrize("init", IN_WEIGHT)
@pytest.mark.parametrize("r", [2, 7])  # twice 7 is more than the full rank
def test_a_plain_adapter_makes_the_same_change_to_the_same_base(layer, init, r):
    base, x = layer[0].to(F64), layer[1].to(F64)
    before = base(x)
    model = randomize(adapted(copy.deepcopy(base), init, r), std=0.3)
    adapter = model[0].adapter("default")
    plain = adapter.plain()
    assert plain.config.r == min(2 * r, adapter.kind.in_features, adapter.kind.out_features)
    assert set(plain.state_dict()) == {"lora_A", "lora_B"}
    assert relative_difference(plain(x, before, base), model(x)) <= 1e-12
    assert plain.plain() is plain


@pytest.mark.parametrize("init", ["orthogonal", *IN_WEIGHT])
def test_training_moves_the_adapter_and_leaves_the_base_bit_identical(layer, init):
    base, x = layer
    before = base.weight.detach().clone()
    model = adapted(base, init)
    adapter = model[0].adapter("default")
    start = adapter.lora_A.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(base.weight, before)
    assert not torch.equal(adapter.lora_A, start)
    if init != "orthogonal":
        assert torch.equal(adapter.lora_A0, start)


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_dropout_leaves_out_changes_and_never_a_part_of_the_base(layer, init):
    base, x = layer
    before = base(x)
    model = adapted(base, init, dropout=0.5).train()
    assert torch.equal(model(x), before)
    randomize(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_small_changes_are_not_lost_in_half_precision(init):
    """Factors of size 1 in bfloat16 have steps of 1/256; a change of 1e-4 arrives all the same."""
    base = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(base.weight)
    base.weight.data[:, :2] = 3
    model = adapted(base.bfloat16(), init)
    adapter = model[0].adapter("default")
    change = torch.randn(64, 2) * 1e-4
    adapter.lora_B.data += change
    x = torch.randn(256, 64)
    with torch.no_grad():
        base.weight.zero_()  # what is left is the adapter's change
        found = model(x.bfloat16()).float()
        expected = 5 / 2 * x.bfloat16().float() @ adapter.lora_A.T @ change.T
    assert (found - expected).norm() <= 0.02 * expected.norm()  # three roundings to 8 bits


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_state_dict_holds_the_start_and_restores_it(init):
    base = nn.Linear(12, 8)
    model = randomize(adapted(copy.deepcopy(base), init))
    state = model.state_dict()
    assert {"0.adapters.default.lora_A0", "0.adapters.default.lora_B0"} <= set(state)
    other = adapted(base, init)
    other.load_state_dict(state)
    x = torch.randn(5, 12)
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(other)(x), model(x))


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_reset_goes_back_to_the_start(init):
    base = nn.Linear(12, 8)
    x = torch.randn(5, 12)
    before = base(x)
    model = randomize(adapted(base, init))
    model[0].adapter("default").reset_parameters()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("init", IN_WEIGHT)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_component_can_be_trained_though_the_weight_has_fewer(init, rank):
    base = nn.Linear(12, 8)
    base.weight.data = torch.randn(8, rank) @ torch.randn(rank, 12)
    model = adapted(base, init, r=3)
    x = torch.randn(5, 12)
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    adapter = model[0].adapter("default")
    moved = adapter.lora_A.grad.abs().sum(1) + adapter.lora_B.grad.abs().sum(0)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_embeddings_keep_their_own_start(init):
    model = inject(nn.Sequential(nn.Embedding(12, 8)), "*", LoRAConfig(r=2, init=init))
    assert not model[0].adapter("default").lora_A.any()


@pytest.mark.parametrize("init", [*IN_WEIGHT, "loftq", "eva"])
def test_embeddings_refuse_other_starts_by_name(init):
    with pytest.raises(TargetError, match=rf"0: an embedding has a start of its own.*cannot have init='{init}'"):
        inject(nn.Sequential(nn.Embedding(12, 8)), "*", LoRAConfig(r=2, init=init))


@pytest.mark.parametrize("init", IN_WEIGHT)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda layer: layer.weight.data.__setitem__((3, 4), math.nan), "holds NaN or infinity"),
        (lambda layer: layer.weight.data.__setitem__((3, 4), math.inf), "holds NaN or infinity"),
        (lambda layer: layer.to("meta"), "is on the meta device and holds no values yet"),
    ],
)
def test_weights_without_values_are_refused_before_anything_changes(net, init, spoil, said):
    spoil(net.downs[1])
    with pytest.raises(TargetError, match=rf"downs\.1: init='{init}'.*{said}"):
        inject(net, config=LoRAConfig(r=2, init=init))
    assert not adapted_layers(net)


@pytest.mark.parametrize(
    ("init", "said"), [("loftq", r"call quantize\(model\)"), ("eva", r"call initialize_eva\(model, batches\) first")]
)
def test_an_adapter_whose_start_is_missing_refuses_to_compute(net, tokens, init, said):
    inject(net, config=LoRAConfig(r=2, init=init))
    with pytest.raises(AdapterError, match=said):
        net(tokens)
    with pytest.raises(AdapterError, match=said):
        merge(net)


@pytest.mark.parametrize("init", IN_WEIGHT)
def test_hugging_faces_transposed_layer_starts_as_the_linear_layer_with_its_weight(init):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 12)
    linear = nn.Linear(12, 8)
    linear.weight.data = conv1d.weight.detach().T.contiguous()
    x = torch.randn(5, 12)
    before = conv1d(x)
    models = [adapted(base, init) for base in (conv1d, linear)]
    assert torch.equal(models[0](x), before)
    one, other = (model[0].adapter("default") for model in models)
    assert relative_difference(one.lora_A, other.lora_A) <= 1e-5  # float32, another memory layout
    assert relative_difference(one.lora_B, other.lora_B) <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapter_with_a_start_compiles_as_one_graph():
    model = randomize(adapted(nn.Linear(12, 8), "pissa"))
    x = torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


class TestAgainstPEFT:
    """PEFT rewrites the base and we do not; the trained function has to be the same."""

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_start_and_first_gradients_are_the_same(self, init):
        peft = pytest.importorskip("peft")
        base = nn.Sequential(nn.Linear(24, 16))
        theirs = peft.get_peft_model(
            copy.deepcopy(base),
            peft.LoraConfig(r=4, lora_alpha=10, target_modules=["0"], init_lora_weights=init),
        )
        ours = inject(base, "*", LoRAConfig(r=4, alpha=10, init=init))
        x = torch.randn(9, 24)
        assert relative_difference(ours(x), theirs(x)) <= 1e-5  # float32
        for model in (ours, theirs):
            model(x).square().sum().backward()
        layer = theirs.base_model.model[0]
        theirs_A, theirs_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        adapter = ours[0].adapter("default")
        assert relative_difference(adapter.lora_B @ adapter.lora_A, theirs_B @ theirs_A) <= 1e-5
        # the sign of a component is open, so what is compared is the first step of gradient descent on B A
        step, their_step = (
            b.grad @ a + b @ a.grad for a, b in ((adapter.lora_A, adapter.lora_B), (theirs_A, theirs_B))
        )
        assert relative_difference(step, their_step) <= 1e-5
        assert relative_difference(adapter.lora_A.grad.abs(), theirs_A.grad.abs()) <= 1e-5
        assert relative_difference(adapter.lora_B.grad.abs(), theirs_B.grad.abs()) <= 1e-5
