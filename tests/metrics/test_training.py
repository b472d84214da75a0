"""Gradients, tokens and memory: counted as their definitions say."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, VeRAConfig, inject, quantize
from lightning_lora.metrics import throughput
from lightning_lora.metrics.gradient_norm import GradientNorm, gradient_norm
from lightning_lora.metrics.memory import PeakMemory, SavedActivations, holdings, memory_name
from lightning_lora.metrics.throughput import Stopwatch, Throughput, count_tokens
from lightning_lora.metrics.updates import base_norms, dense_update, update_factors, updates
from lightning_lora.model.active import activate
from lightning_lora.model.layers import adapted_layers
from lightning_lora.optim.report import state_tensors
from tests.conformance.combinations import Combination, every_combination, refusal
from tests.conftest import randomize

POSSIBLE = [
    c for c in every_combination() if refusal(c) is None and c.init in ("kaiming", None) and c.storage != "bf16"
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("combination", POSSIBLE, ids=str)
def test_the_update_of_every_method_is_that_of_its_merge(combination: Combination):
    layers = adapted_layers(combination.trained())
    found, norms = updates(layers), base_norms(layers)
    for name, layer in layers.items():
        dense = dense_update(layer).flatten(1).double()
        # The merge rounds to float32, once for W and once for the sum.
        rounding = 1e-6 * norms[name]
        assert found[name].norm == pytest.approx(dense.norm().item(), abs=rounding)
        if combination.method == "dora" or combination.kind.endswith("experts"):
            assert found[name].values is None
        else:
            expected = torch.linalg.svdvals(dense)[: len(found[name].values)]
            assert torch.allclose(found[name].values, expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_of_a_start_in_the_weight_the_change_counts(init, storage):
    if (init, storage) == ("loftq", "fp32"):
        pytest.skip("fitted to a quantized base")
    combination = Combination("lora", "linear", storage, init)
    fresh = adapted_layers(combination.fresh())
    assert updates(fresh)["0"].norm == 0
    assert dense_update(fresh["0"]).norm() <= 1e-6 * base_norms(fresh)["0"]
    trained = adapted_layers(combination.trained())
    expected = dense_update(trained["0"]).norm().item()
    assert updates(trained)["0"].norm == pytest.approx(expected, rel=1e-5)  # of weights in float32


@pytest.mark.parametrize("rank", [3, 7, 40])
@pytest.mark.parametrize("sizes", [(24, 16), (16, 24)])
def test_what_is_shared_by_layers_is_used_without_changing_their_spectra(sizes, rank):
    """VeRA decomposes its projection once; rows of it depend on each other where the rank exceeds their length."""
    model = nn.Sequential(*(nn.Linear(*sizes) for _ in range(2)))
    layers = adapted_layers(inject(model, ["0", "1"], VeRAConfig(r=rank)))
    for _ in range(2):  # measured again after the vectors have moved
        randomize(model)
        found = updates(layers)
        for name, layer in layers.items():
            vera = layer.adapter("default")
            names = ("vera_lambda_b", "vera_B", "vera_lambda_d", "vera_A")
            b, B, d, A = (getattr(vera, tensor).detach().double() for tensor in names)
            dense = torch.diag(b) @ B @ torch.diag(d) @ A
            assert found[name].norm == pytest.approx(dense.norm().item(), rel=1e-6)
            values = torch.linalg.svdvals(dense)
            kept = found[name].values
            assert torch.allclose(kept, values[: len(kept)], rtol=0, atol=1e-6 * values[0].item())


def test_adapters_that_compute_together_are_measured_together():
    model = inject(nn.Sequential(nn.Linear(9, 7)), "0", LoRAConfig(r=2), name="one")
    inject(model, "0", LoRAConfig(r=3), name="two")
    randomize(activate(model, "one", "two"))
    layer = adapted_layers(model)["0"]
    assert updates({"0": layer})["0"].norm == pytest.approx(dense_update(layer).norm().item(), rel=1e-5)
    lora_A, lora_B = update_factors(layer)
    assert (lora_A.shape, lora_B.shape) == ((5, 9), (7, 5))
    activate(model)
    assert updates({"0": layer})["0"].norm == 0


def test_the_gradient_norm_is_that_of_one_long_vector():
    gradients = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2, 2)]
    whole = torch.cat([g.flatten() for g in gradients]).norm()
    assert torch.allclose(gradient_norm(gradients), whole)
    metric = GradientNorm()
    metric.update(gradients)
    metric.update([2 * g for g in gradients])
    assert metric.compute().item() == pytest.approx(whole.item() * (5 / 2) ** 0.5, rel=1e-6)


def test_half_precision_does_not_overflow_the_gradient_norm():
    assert gradient_norm([torch.full((100,), 6e4, dtype=torch.float16)]).item() == pytest.approx(6e5, rel=1e-3)


IDS = torch.tensor([[5, 6, 0], [7, 0, 0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "where", "count"),
    [
        ({"input_ids": IDS}, None, 6),
        ({"input_ids": IDS, "attention_mask": MASK}, None, 3),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, None, 6),  # not one for each token
        ([IDS, torch.tensor([0, 1])], None, 6),
        ((torch.rand(2, 3), torch.tensor([0, 1])), None, None),  # labels are no tokens
        (({"x": torch.rand(2, 3), "y": [IDS]}, None), None, 6),
        (IDS, None, 6),
        (IDS.bool(), None, None),
        ("text", None, None),
        ({"x": torch.rand(2, 3)}, "x", 6),
        ({"input_ids": IDS, "loss_mask": MASK.bool()}, "loss_mask", 3),
        ([torch.rand(2, 4), IDS], 0, 8),
        (IDS, 0, 6),
    ],
)
def test_a_token_is_what_the_documentation_says(batch, where, count):
    found = count_tokens(batch, where)
    assert (found if found is None else int(found)) == count


@pytest.mark.parametrize(
    ("batch", "where", "said"),
    [({"x": IDS}, "ids", "'ids' names no tensor of the batch, a dict with 'x': Tensor"), ([IDS], 3, "a list with 0")],
)
def test_tokens_that_are_not_where_they_are_said_to_be_are_an_error(batch, where, said):
    with pytest.raises(ValueError, match=said):
        count_tokens(batch, where)


def test_throughput_is_tokens_over_seconds():
    metric = Throughput()
    metric.update(300, 2.0)
    metric.update(torch.tensor(100), 2.0)
    assert metric.compute().item() == 100


def test_a_stopwatch_counts_only_while_it_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Stopwatch()
    for at, act in [(1, clock.start), (3, clock.start), (4, clock.stop), (9, clock.stop), (10, clock.start)]:
        now[0] = at
        act()
    now[0] = 12
    assert clock.seconds == 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_process_is_at_least_what_it_uses_now():
    """And at most what the system's accounting says, which may count the process that started this one."""
    resource = pytest.importorskip("resource")
    metric = PeakMemory()
    ballast = torch.ones(2**25)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    metric.update(CPU)
    del ballast
    metric.update(CPU)
    page = 2**21  # the kernel counts resident pages per thread, and adds them up now and then
    assert now - page <= metric.compute() <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + page
    assert memory_name(CPU) == "rss"


def test_what_a_run_holds_is_counted_to_the_byte():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "head": nn.Linear(32, 4)})
    inject(model, "a", LoRAConfig(r=2), train="head")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    adapters, head = 4 * 2 * (64 + 32), 4 * (32 * 4 + 4)
    held = holdings(model, state_tensors(optimizer))
    assert held.to_dict() == {
        "base": 4 * (64 * 32 + 32),
        "adapters": adapters,
        "trained": head,
        "gradients": 0,
        "optimizer": 0,
    }
    model["head"](model["a"](torch.randn(3, 64))).sum().backward()
    optimizer.step()
    held = holdings(model, state_tensors(optimizer))
    assert held.gradients == adapters + head
    assert held.optimizer == 2 * (adapters + head) + 4 * 4  # two moments, and a count of steps for each tensor
    assert holdings(quantize(model)).base == 64 * 32 // 2 + 64 * 32 // 64 + 4 * (1 + 1) + 4 * 32  # codes, maxima, bias


def test_saved_activations_are_counted_to_the_byte():
    """``tanh`` keeps its result, a layer with a trained weight its input, and each piece counts once."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)
    with SavedActivations(model) as saved:
        loss = model(x).sum()
    assert saved.bytes == 4 * 5 * (8 + 16)  # the result of tanh is the input of the next layer
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_of_recomputed_activations_only_what_is_kept_counts():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    x = torch.randn(5, 8, requires_grad=True)
    with SavedActivations(model) as saved:
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()
    assert saved.bytes == 4 * 5 * 8  # x, to compute the rest from
