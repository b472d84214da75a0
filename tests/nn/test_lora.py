"""LoRA on one layer: the mathematics, against closed forms in float64."""

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn import dropout
from lightning_lora.nn.linear import LinearKind
from lightning_lora.nn.lora import LoRA
from tests.conftest import randomize

N, IN, OUT, R, ALPHA = 7, 6, 5, 3, 2.0  # alpha / r = 2/3: a forgotten factor s would show


def layer(dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    host = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    return randomize(inject(host, config=LoRAConfig(**{"r": R, "alpha": ALPHA, **settings})), std=1.0)[0]


def test_output_and_gradients_equal_the_closed_form():
    host = layer()
    base, adapter = host.base_layer, host.adapter("default")
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(N, OUT, dtype=torch.float64)
    y = host(x)
    y.backward(g)
    with torch.no_grad():
        a, b, s = adapter.lora_A, adapter.lora_B, ALPHA / R
        expected = x @ base.weight.T + base.bias + s * x @ a.T @ b.T
        assert torch.allclose(y, expected, atol=1e-12)  # float64: sums of a few dozen terms
        assert torch.allclose(adapter.lora_B.grad, s * g.T @ x @ a.T, atol=1e-12)
        assert torch.allclose(adapter.lora_A.grad, s * b.T @ g.T @ x, atol=1e-12)
        assert torch.allclose(x.grad, g @ base.weight + s * g @ b @ a, atol=1e-12)
    assert base.weight.grad is None


def test_gradients_pass_gradcheck_also_twice():
    host = layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(host, (x,))
    assert torch.autograd.gradgradcheck(host, (x,))


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 3, IN), (2, 1, 3, IN)])
def test_any_leading_shape_is_kept(shape):
    assert layer()(torch.randn(*shape, dtype=torch.float64)).shape == (*shape[:-1], OUT)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_training_starts_at_the_base_model_bit_for_bit(init, scaling):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    x = torch.randn(9, 32)
    before = model(x)
    assert torch.equal(inject(model, "*", LoRAConfig(init=init, scaling=scaling))(x), before)


@pytest.mark.parametrize(("init", "std"), [("kaiming", 1 / math.sqrt(3 * 4096)), ("gaussian", 1 / 16)])
def test_initial_values_have_the_published_spread(init, std):
    adapter = LoRA(LoRAConfig(r=16, init=init), LinearKind(4096, 64), device=torch.device("cpu"), dtype=torch.float32)
    assert adapter.lora_A.std().item() == pytest.approx(std, rel=0.05)  # 65,536 draws: the sample deviates by 0.3%
    assert not adapter.lora_B.any()
    if init == "kaiming":
        assert adapter.lora_A.abs().max() <= 1 / math.sqrt(4096)


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoRAConfig(r=16, alpha=8).scale == 0.5
    assert LoRAConfig(r=16, alpha=8, scaling="rslora").scale == 2.0
    assert LoRAConfig(r=1, alpha=3).scale == LoRAConfig(r=1, alpha=3, scaling="rslora").scale


def test_dropout_acts_on_the_adapter_alone_while_training():
    host = layer(dropout=0.5).train()
    x = torch.ones(64, IN, dtype=torch.float64)
    base = host.base_layer(x)
    torch.manual_seed(3)
    found = host(x) - base
    torch.manual_seed(3)
    adapter = host.adapter("default")
    dropped = x * dropout.kept(dropout.draw_seed(), x.shape, 0.5, x.dtype, x.device) / (1 - 0.5)
    expected = dropped @ adapter.lora_A.T @ adapter.lora_B.T * (ALPHA / R)
    assert torch.allclose(found, expected, atol=1e-12)
    host.eval()
    assert torch.equal(host(x), host(x))


def test_half_precision_base_keeps_full_precision_adapters_and_half_precision_output():
    model = inject(nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16)), config=LoRAConfig(r=4))
    y = model(torch.randn(3, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_autocast_computes_in_its_dtype():
    model = inject(nn.Sequential(nn.Linear(16, 16)), config=LoRAConfig(r=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(3, 16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[0].adapter("default").lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("r", [1, 2, 4])
def test_lora_reaches_the_eckart_young_bound(r):
    """For whitened inputs and target W + D, the least loss is the sum of D's later squared singular values."""
    delta = torch.randn(24, 32, dtype=torch.float64)
    model = inject(nn.Sequential(nn.Linear(32, 24, bias=False, dtype=torch.float64)), config=LoRAConfig(r=r, alpha=r))
    target = model[0].base_layer.weight + delta
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    x = torch.eye(32, dtype=torch.float64)
    for _ in range(1500):
        loss = (model(x) - target.T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    bound = torch.linalg.svdvals(delta)[r:].square().sum()
    assert 1 <= loss.item() / bound.item() + 1e-9 <= 1.01  # 1e-9: rounding at the bound itself


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"r": -4}, "r must be at least 1"),
        ({"alpha": 0}, "alpha must be finite and above 0"),
        ({"alpha": -1.0}, "alpha must be finite and above 0"),
        ({"alpha": math.nan}, "alpha must be finite and above 0"),
        ({"alpha": math.inf}, "alpha must be finite and above 0"),
        ({"dropout": 1.0}, "dropout must be"),
        (
            {"init": "zeros"},
            "init must be one of eva, gaussian, kaiming, loftq, olora, orthogonal, pissa, ",
        ),
        ({"init": "pissa_niter_"}, "init must be one of"),
        ({"init": None}, "init must be one of"),
        ({"init": "orthogonal", "r": 3}, "needs an even r, got 3; use r=4"),
        ({"scaling": "alpha/r"}, "scaling must be one of rslora, standard"),
    ],
)
def test_values_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LoRAConfig(**settings)


@pytest.mark.parametrize("settings", [{"r": 8.0}, {"r": "8"}, {"r": True}, {"alpha": "16"}, {"dropout": None}])
def test_values_of_another_type_are_refused(settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be"):
        LoRAConfig(**settings)
