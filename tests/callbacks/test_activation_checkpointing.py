"""Activations that are recomputed: the same run in less memory, and a module left as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, TargetError, inject
from lightning_lora.callbacks.activation_checkpointing import checkpoint_blocks, fit_by_itself
from lightning_lora.model.blocks import named_blocks, repeated_blocks
from tests.conftest import Net, randomize
from tests.runs import Module, loader

CPU = torch.device("cpu")


class Stack(nn.Module):
    def __init__(self, depth=4, width=32):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def kept(model, x):
    """Bytes of tensors that autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(storages.values()), torch.autograd.grad(loss, trained)


def adapted():
    return randomize(inject(Stack(), config=LoRAConfig(r=4, dropout=0.1)))


@pytest.mark.parametrize("patterns", ["layers", "layers.*", ("layers.0", "layers.1", "layers.2", "layers.3")])
def test_gradients_are_the_same_bit_for_bit_and_less_is_kept(patterns):
    model, x = adapted(), torch.randn(8, 32)
    torch.manual_seed(1)
    before, expected = kept(model, x)
    undo = checkpoint_blocks(model, patterns, CPU)
    torch.manual_seed(1)  # dropout is drawn as before, and drawn again in the backward pass
    after, found = kept(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert after < before / 2
    for step in undo:
        step()
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_copy_computes_by_itself_and_without_recomputation():
    model = adapted().eval()
    checkpoint_blocks(model, "layers", CPU)
    twin = copy.deepcopy(model)
    randomize(twin, std=1.0)
    x = torch.randn(8, 32)
    assert not torch.equal(twin(x), model(x))


def test_names_are_those_of_the_outermost_modules_and_of_lists_their_modules():
    model = Stack()
    assert list(named_blocks(model, ["layers"])) == list(named_blocks(model, ["layers.*"]))
    assert list(named_blocks(model, ["layers", "head"])) == [*(f"layers.{i}" for i in range(4)), "head"]
    assert list(repeated_blocks(model)) == [f"layers.{i}" for i in range(4)]
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == {}


def test_a_name_that_fits_nothing_is_refused():
    with pytest.raises(TargetError, match=r"activation_checkpointing='layer' fits no module of Stack; near it: layers"):
        named_blocks(Stack(), ["layer"])


@pytest.mark.parametrize(("free", "recomputed"), [(10_000, False), (300, True)])
def test_auto_recomputes_from_the_second_block_on_where_all_would_not_fit(free, recomputed):
    """A memory in which every block keeps 100 bytes stands for a GPU's."""
    model, x = adapted(), torch.randn(8, 32)
    torch.manual_seed(1)
    before, expected = kept(model, x)
    allocated = iter(range(0, 100_000, 100))
    fit_by_itself(repeated_blocks(model), lambda: (next(allocated), free))
    torch.manual_seed(1)
    after, found = kept(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (after < before / 2) == recomputed


def test_auto_leaves_a_cpu_alone():
    model = adapted()
    assert checkpoint_blocks(model, "auto", CPU) == []


def test_a_run_is_the_same_and_the_module_is_left_as_it_was(trainer):
    losses = []
    for chosen in (None, ["blocks", "downs"], "auto"):
        torch.manual_seed(0)
        module = Module(Net())
        run = trainer(LoRACallback(r=4, activation_checkpointing=chosen), max_epochs=2)
        run.fit(module, loader())
        losses.append(module.losses)
        assert not [part for part in module.modules() if "forward" in vars(part)]
    assert losses[0] == losses[1] == losses[2]


def test_a_name_that_fits_nothing_stops_the_run(trainer):
    with pytest.raises(TargetError, match="activation_checkpointing='laers' fits no module"):
        trainer(LoRACallback(activation_checkpointing="laers")).fit(Module(), loader())
