"""DoRA: the mathematics against dense formulas and PEFT, and a weight norm that is neither repeated nor stale."""

import copy

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_lora import AdapterError, DoRAConfig, LoRAConfig, activate, disabled, inject, merge, quantize
from lightning_lora.nn import dropout
from lightning_lora.nn.dora import DoRA
from lightning_lora.nn.functional import row_norms
from lightning_lora.nn.kinds import kind_of
from tests.conftest import randomize, relative_difference
from tests.nn.test_kinds import LAYERS, tokens, values
from tests.nn.test_once_per_step import paged_8bit

SCALE = 5 / 3


@pytest.fixture(params=LAYERS)
def case(request) -> tuple[nn.Module, torch.Tensor]:
    build, x = LAYERS[request.param]
    return nn.Sequential(build().to(torch.float64)), x


def adapted(model: nn.Module, **settings) -> DoRA:
    """Put a DoRA with random factors, and magnitudes around the lengths of the rows, on the model's first layer."""
    inject(model, "0", DoRAConfig(**{"r": 3, "alpha": 5, **settings}))
    adapter = model[0].adapter("default")
    magnitudes = adapter.lora_magnitude_vector.detach().clone()
    randomize(model, std=0.3)
    adapter.lora_magnitude_vector.data.copy_(magnitudes * torch.rand_like(magnitudes).add(0.5))
    if isinstance(model[0].base_layer, nn.Embedding) and model[0].base_layer.padding_idx is not None:
        adapter.lora_A.data[:, model[0].base_layer.padding_idx] = 0  # where it starts, and stays
    return adapter


def dense(base: nn.Module, adapter: DoRA) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The factors as leaves of a new graph, and the weight of section 4.3 made of them in full."""
    kind = kind_of(base)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    V = kind.to_matrix(base.weight.detach()) + SCALE * leaves["lora_B"] @ leaves["lora_A"]
    direction = V / V.detach().norm(dim=1, keepdim=True)
    return leaves, kind.from_matrix(leaves["lora_magnitude_vector"].unsqueeze(1) * direction)


def test_a_fresh_dora_changes_nothing(case):
    model, x = case
    before = model(x)
    inject(model, "*", DoRAConfig(r=3))
    assert torch.equal(model(x), before)
    assert torch.equal(model.eval()(x), before)


def test_a_fresh_dora_changes_nothing_over_a_quantized_base():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    quantize(inject(model, "*", DoRAConfig(r=4)))
    x = torch.randn(5, 64)
    with disabled(model):
        expected = model(x)
    assert torch.equal(model(x), expected)
    stored = model[0].base_layer.dequantize(torch.float32)
    magnitudes = model[0].adapter("default").lora_magnitude_vector
    assert relative_difference(magnitudes, stored.norm(dim=1)) <= 1e-6  # float32: another order of summation


def test_output_and_gradients_are_those_of_the_dense_formula(case):
    """Against autograd of ``m V/||V||`` with the norm held constant, in float64: only the order of sums differs."""
    model, x = case
    base = model[0]
    adapter = adapted(model)
    probe = torch.randn_like(model(x))
    (model(x) * probe).sum().backward()
    leaves, weight = dense(base, adapter)
    expected = torch.func.functional_call(base, {"weight": weight}, (x,))
    (expected * probe).sum().backward()
    assert relative_difference(model(x), expected) <= 1e-12
    for name, leaf in leaves.items():
        assert relative_difference(adapter.get_parameter(name).grad, leaf.grad) <= 1e-12, name
    assert base.weight.grad is None


def test_merging_gives_the_adapted_function(case):
    model, x = case
    adapted(model)
    expected = model(x)
    assert relative_difference(merge(model)(x), expected) <= 1e-12


def theirs(layer: nn.Module, adapter: DoRA) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    host = model.base_model.model[0]
    if isinstance(layer, nn.Embedding):
        A, B = host.lora_embedding_A["default"], host.lora_embedding_B["default"]
    else:
        A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
    m = host.lora_magnitude_vector["default"].weight
    parameters = {"lora_A": A, "lora_B": B, "lora_magnitude_vector": m}
    for name, parameter in parameters.items():
        parameter.data.copy_(adapter.get_parameter(name).detach().view(parameter.shape))
    return model, parameters


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: nn.Linear(12, 8), values(2, 5, 12).float()),
        (lambda: nn.Embedding(12, 8), tokens(3, 4)),
        (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), values(2, 6, 9, 10).float()),
    ],
    ids=["linear", "embedding", "conv2d"],
)
def test_output_and_gradients_are_pefts(build, x):
    model = nn.Sequential(build())
    layer = model[0]
    adapter = adapted(model)
    peer, parameters = theirs(layer, adapter)
    found, expected = model(x), peer(x)
    probe = torch.randn_like(found)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    assert relative_difference(found, expected) <= 1e-5  # float32, sums of at most 54 terms
    for name, parameter in parameters.items():
        grad = adapter.get_parameter(name).grad
        assert relative_difference(grad, parameter.grad.view(grad.shape)) <= 1e-5, name


def test_gradients_pass_gradcheck():
    """With respect to the input: with respect to ``A`` and ``B`` they are not the derivative, the norm being held."""
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    adapted(model)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradgradcheck(model, (x,))


def test_dropout_acts_on_the_update_alone():
    model = nn.Sequential(nn.Linear(12, 8, dtype=torch.float64)).train()
    base = model[0]
    adapter = adapted(model, dropout=0.5)
    x = values(5, 12)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    dropped = x * dropout.kept(dropout.draw_seed(), x.shape, 0.5, x.dtype, x.device) / (1 - 0.5)
    update = SCALE * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    V = base.weight + SCALE * adapter.lora_B @ adapter.lora_A
    factor = adapter.lora_magnitude_vector / V.norm(dim=1)
    expected = factor * (x @ base.weight.T + update) + base.bias
    assert relative_difference(found, expected) <= 1e-12
    _, weight = dense(base, adapter)
    assert relative_difference(model.eval()(x), nn.functional.linear(x, weight, base.bias)) <= 1e-12


def test_half_precision_rounds_the_output_and_not_the_factor():
    """Next to 1.02, bf16 holds 1.0156 and 1.0234; the mean over 16,384 outputs shows the factor itself."""
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    plain = model(x).double() - model[0].bias.double()
    inject(model, "0", DoRAConfig(r=4))
    model[0].adapter("default").lora_magnitude_vector.data.mul_(1.02)
    changed = model(x).double() - model[0].bias.double()
    assert model(x).dtype == torch.bfloat16
    factor = (changed * plain).sum() / plain.square().sum()
    assert abs(factor.item() - 1.02) <= 1e-3  # each output is rounded by up to 2^-9, their mean by far less


def test_a_row_of_zeros_has_no_direction_and_can_be_learnt():
    """As in layers that start at zero, which PEFT's DoRA turns to NaN."""
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    inject(model, "0", DoRAConfig(r=2))
    x, target = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(50):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    expected = model(x)
    assert torch.allclose(merge(model)(x), expected, atol=1e-6)


# ---- the weight norm


class CountNorms(TorchDispatchMode):
    """How often a norm was taken of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.linalg_vector_norm.default
        return func(*args, **(kwargs or {}))


def small_net() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))
    return inject(model, "*", DoRAConfig(r=4))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_the_norm_is_taken_once_per_layer_and_optimizer_step(packed, reentrant):
    model = small_net()
    if packed:
        quantize(model)
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer._cpu_paged_warned = True
    with CountNorms() as norms:
        for step in range(3):
            for _ in range(4):  # accumulated
                x = torch.randn(5, 64, requires_grad=True)
                y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
                y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert norms.count == 2 * (step + 1)


@pytest.mark.parametrize(
    "make", [paged_8bit, lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)], ids=["PagedAdamW8bit", "fused AdamW"]
)
def test_after_a_step_the_model_computes_what_a_copy_computes(make):
    """A copy takes the norm anew. Neither of these optimizers raises the version counter of what it writes."""
    model, x = small_net(), torch.randn(5, 64)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_another_base_is_measured_anew():
    model, x = small_net(), torch.randn(5, 64)
    randomize(model)
    model(x)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    model(x)
    quantize(model)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_a_model_can_be_evaluated_in_inference_mode_and_then_trained():
    model, x = small_net(), torch.randn(5, 64)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()


def test_transforms_of_torch_func_see_through_the_kept_norm():
    model, x = small_net(), torch.randn(5, 64)
    model(x)
    names = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    changed = {name: torch.randn_like(p) for name, p in names.items()}
    grads = torch.func.grad(lambda ps: torch.func.functional_call(model, ps, (x,)).square().sum())(changed)
    model.load_state_dict(changed, strict=False)
    model(x).square().sum().backward()
    for name, grad in grads.items():
        assert torch.allclose(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-5), name


def test_autocast_does_not_round_the_norm():
    model, x = small_net(), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
        with disabled(model):
            expected = model(x)
    assert torch.equal(found, expected)
    assert found.dtype == torch.bfloat16


def test_the_norm_is_accurate_where_the_update_cancels_the_weight():
    """Rows of a thousandth of the weight's length; the expanded formula would be wrong in the first digit."""
    A, B = torch.randn(8, 3000), torch.randn(700, 8)
    W = -2 * B @ A + 3e-3 * torch.randn(700, 3000)
    exact = (W.double() + 2 * B.double() @ A.double()).norm(dim=1)
    found = row_norms(W, A, B, 2.0)
    assert ((found - exact) / exact).abs().max() <= 1e-4  # float32 rounds W itself by 6e-8 of a value 1e3 times as long


@pytest.mark.parametrize("other", [DoRAConfig(r=2), LoRAConfig(r=2)])
def test_dora_refuses_to_compute_beside_another_adapter(other):
    model = inject(small_net(), "0", other, name="second")
    with pytest.raises(AdapterError, match=r"'?default, second.* active together on 0: 'default' is dora"):
        activate(model, "default", "second")
    assert model[0].active == ("second",)
    activate(model, "default")
