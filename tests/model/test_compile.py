"""A compiled model over a quantized base: no breaks, and one graph for what is equal."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lightning_lora import LoRAConfig, NF4Config, activate, disabled, inject, load_adapter, quantize, save_adapter
from tests.conftest import randomize, relative_difference

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


NF4 = NF4Config()


def adapted(count: int, config: LoRAConfig, *, storage: NF4Config | None = NF4, names=("a", "b")) -> nn.Module:
    model = nn.Sequential(*(Block() for _ in range(count)))
    for name in names:
        inject(model, config=config, name=name)
        randomize(model)
    if storage is not None:
        quantize(model, storage)
    return activate(model, names[0])


@pytest.fixture
def counter():
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounterWithBackend("aot_eager")
    assert not counters["graph_break"]
    torch._dynamo.reset()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(model(leaf).square().sum(), [leaf, *trained]))


@pytest.mark.parametrize(
    ("storage", "dropout"),
    [(NF4, 0.1), (NF4Config(double_quant=False, block_size=128), 0.0), (NF4Config(compute_dtype=torch.bfloat16), 0.0)],
    ids=["nf4", "plain maxima", "bfloat16"],
)
def test_a_quantized_model_is_one_graph_without_breaks_that_computes_the_same(counter, storage, dropout):
    model = adapted(2, LoRAConfig(r=4, dropout=dropout), storage=storage)
    model.train(dropout == 0)  # what drops out differs from call to call, so it is compared where none does
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    x = torch.randn(5, WIDTH)
    # The same kernels in the same order; autograd may only add up the gradient of x in another.
    assert relative_difference(compiled(x.clone().requires_grad_()), model(x)) <= 1e-6
    for found, expected in zip(gradients(compiled, x), gradients(model, x), strict=True):
        assert relative_difference(found, expected) <= 1e-5
    assert counter.frame_count == 1
    compiled.train()
    compiled(x.clone().requires_grad_())
    assert counters["stats"]["unique_graphs"] == counter.frame_count


def test_layers_compiled_one_by_one_share_one_graph(counter):
    model = adapted(5, LoRAConfig(r=4))
    expected = gradients(copy.deepcopy(model), torch.ones(3, WIDTH))
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    for found, wanted in zip(gradients(model, torch.ones(3, WIDTH)), expected, strict=True):
        assert relative_difference(found, wanted) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("storage", [None, NF4Config()], ids=["dense", "nf4"])
def test_switching_to_another_adapter_of_the_config_uses_the_graph_there_is(counter, storage, tmp_path):
    model = adapted(3, LoRAConfig(r=4), storage=storage)
    save_adapter(model, tmp_path, "b")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, WIDTH, requires_grad=True)
    outputs = {}
    for name in ("a", "b", "a", "b"):
        activate(model, name)
        outputs[name] = compiled(x)
        # Eager mode lays narrow products out by columns, which sums in another order.
        assert relative_difference(outputs[name], model(x)) <= 1e-6, name
    load_adapter(model, tmp_path, "c")
    activate(model, "c")
    assert torch.equal(compiled(x), outputs["b"])
    assert not torch.equal(outputs["a"], outputs["b"])
    assert counter.frame_count == 1


def test_each_other_structure_is_a_graph_of_its_own_once(counter):
    model = adapted(2, LoRAConfig(r=4))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, WIDTH, requires_grad=True)
    for _ in range(2):
        for names in (("a",), ("a", "b"), ("b", "a")):
            activate(model, *names)
            assert relative_difference(compiled(x), model(x)) <= 1e-6
        with disabled(model):
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 3  # one adapter, two, none


def test_training_a_compiled_quantized_model_compiles_nothing_after_the_first_step(counter):
    model = adapted(2, LoRAConfig(r=4))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(5, WIDTH, requires_grad=True)
    losses = []
    for _ in range(3):
        losses.append(compiled(x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert counter.frame_count == 1
