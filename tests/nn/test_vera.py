"""VeRA: the mathematics against the dense formula and PEFT, and projections that are shared and come from the seed."""

import copy
import math
import pickle

import peft
import pytest
import torch
from torch import nn

from lightning_lora import TargetError, VeRAConfig, inject, merge
from lightning_lora.nn.vera import projection
from tests.conftest import randomize, relative_difference

N, IN, OUT, R = 7, 6, 5, 9
CPU = torch.device("cpu")


def model(dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    host = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    return randomize(inject(host, "0", VeRAConfig(**{"r": R, **settings})), std=0.5)


def test_output_and_gradients_are_those_of_the_dense_formula():
    net = model()
    base, adapter = net[0].base_layer, net[0].adapter("default")
    x = torch.randn(2, N, IN, dtype=torch.float64)
    y = net(x)
    probe = torch.randn_like(y)
    (y * probe).sum().backward()
    d, b = (p.detach().clone().requires_grad_() for p in (adapter.vera_lambda_d, adapter.vera_lambda_b))
    weight = base.weight + b.diag() @ adapter.vera_B @ d.diag() @ adapter.vera_A
    expected = nn.functional.linear(x, weight, base.bias)
    (expected * probe).sum().backward()
    assert relative_difference(y, expected) <= 1e-12  # float64: another order of summation
    assert relative_difference(adapter.vera_lambda_d.grad, d.grad) <= 1e-12
    assert relative_difference(adapter.vera_lambda_b.grad, b.grad) <= 1e-12
    assert relative_difference(merge(net)(x), expected) <= 1e-12


def test_output_and_gradients_are_pefts_on_the_same_projections():
    net = model(torch.float32)
    adapter = net[0].adapter("default")
    plain = nn.Sequential(copy.deepcopy(net[0].base_layer))
    peer = peft.get_peft_model(plain, peft.VeraConfig(r=R, target_modules=["0"]))
    layer = peer.base_model.model[0]
    theirs = {"vera_lambda_d": layer.vera_lambda_d["default"], "vera_lambda_b": layer.vera_lambda_b["default"]}
    layer.vera_A["default"].copy_(adapter.vera_A)
    layer.vera_B["default"].copy_(adapter.vera_B)
    for name, parameter in theirs.items():
        parameter.data.copy_(adapter.get_parameter(name).detach())
    x = torch.randn(N, IN)
    found, expected = net(x), peer(x)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert relative_difference(found, expected) <= 1e-5  # float32, sums of a dozen terms
    for name, parameter in theirs.items():
        assert relative_difference(adapter.get_parameter(name).grad, parameter.grad) <= 1e-5


def test_d_starts_at_its_constant_and_b_at_zero():
    adapter = inject(nn.Sequential(nn.Linear(IN, OUT)), "0", VeRAConfig(r=R, d_initial=0.25))[0].adapter("default")
    assert adapter.vera_lambda_d.unique().tolist() == [0.25]
    assert not adapter.vera_lambda_b.any()


def projections(net: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in net.named_buffers(remove_duplicate=False) if ".vera_" in name]


def memory(net: nn.Module) -> int:
    """Bytes that the projections of all layers take together."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in projections(net)}
    return sum(storages.values())


CHANGES = {
    "as made": lambda net: net,
    "cast": lambda net: net.to(torch.bfloat16),
    "copied": copy.deepcopy,
    "pickled": lambda net: pickle.loads(pickle.dumps(net)),
    "materialized": lambda net: net.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_of_one_shape_share_their_projections(change):
    net = inject(nn.Sequential(*(nn.Linear(IN, IN) for _ in range(4))), "*", VeRAConfig(r=R))
    changed = change(net)
    width = projections(changed)[0].element_size()  # adapters stay in fp32 when the module is cast to half
    assert len(projections(changed)) == 8
    assert memory(changed) == 2 * R * IN * width
    expected = projection(VeRAConfig(r=R), "A", IN, CPU, torch.float32).to(projections(changed)[0].dtype)
    assert torch.equal(projections(changed)[0], expected)


def test_projections_are_in_no_checkpoint_and_no_pickle():
    net = inject(nn.Sequential(nn.Linear(64, 64)), "0", VeRAConfig(r=1024))
    assert {name for name in net.state_dict() if "adapters" in name} == {
        "0.adapters.default.vera_lambda_d",
        "0.adapters.default.vera_lambda_b",
    }
    assert len(pickle.dumps(net)) < 64 * 1024  # A alone has 1024 x 64 numbers of 4 bytes


def test_projections_come_from_the_seed_alone():
    """These values may never change: vectors that were trained around them are in people's checkpoints."""
    A = projection(VeRAConfig(r=4, seed=0), "A", 6, CPU, torch.float32)
    torch.testing.assert_close(A[0], torch.tensor(PINNED), rtol=0, atol=1e-6)
    assert not torch.equal(A, projection(VeRAConfig(r=4, seed=1), "A", 6, CPU, torch.float32))
    before = torch.random.get_rng_state()
    projection(VeRAConfig(r=4, seed=2), "A", 6, CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


PINNED = [0.9677329, -0.0685625, -0.9693934, 0.4733902, -0.3227369, -0.3774921]


def test_projections_are_kaiming_uniform_and_independent():
    A, B = (projection(VeRAConfig(r=512), factor, 512, CPU, torch.float32) for factor in "AB")
    for matrix in (A, B):
        assert matrix.abs().max() <= math.sqrt(6 / 512)
        assert matrix.var().item() == pytest.approx(2 / 512, rel=0.02)  # 262,144 draws: the sample deviates by 0.2%
    correlation = (A * B).mean() / (A.std() * B.std())
    assert abs(correlation) <= 0.01  # five standard deviations of 1/512


def test_vera_made_in_inference_mode_shares_what_can_be_trained():
    with torch.inference_mode():
        projection(VeRAConfig(r=R, seed=5), "A", IN, CPU, torch.float64)
    net = model(seed=5)
    net(torch.randn(N, IN, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.Embedding(12, 8), "embedding"), (nn.Conv2d(3, 4, 3), "conv")], ids=["embedding", "conv"]
)
def test_other_layers_are_refused_by_name(layer, name):
    with pytest.raises(TargetError, match=f"0: VeRA adapts linear layers, and this is a layer of kind '{name}'"):
        inject(nn.Sequential(layer), "0", VeRAConfig(r=4))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"r": 0}, ValueError, "r must be at least 1"),
        ({"r": 2.0}, TypeError, "r must be an integer"),
        ({"dropout": 1}, ValueError, "dropout must be"),
        ({"d_initial": 0}, ValueError, "d_initial must be finite and not 0"),
        ({"d_initial": math.nan}, ValueError, "d_initial must be finite"),
        ({"seed": "0"}, TypeError, "seed must be an integer"),
    ],
)
def test_values_out_of_range_are_refused(settings, error, said):
    with pytest.raises(error, match=said):
        VeRAConfig(**settings)
