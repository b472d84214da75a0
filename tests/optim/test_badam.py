"""BAdam is AdamW on one block at a time, and goes on exactly where it was saved."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_lora import OptimizerError
from lightning_lora.estimation.optimizers import badam
from lightning_lora.optim.badam import BAdam, BlockAdamW, blocks_of

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two equal blocks between an embedding layer and a head."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.to(dtype)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).float().square().mean()


def of(net, config, **values):
    blocks = list(blocks_of(net).values())
    return BlockAdamW([{"params": list(net.parameters()), **values}], blocks, config)


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net(X.to(net.head.weight.dtype)).backward()
        optimizer.step()
    return net


def test_one_block_is_adamw_bit_for_bit():
    ours = nn.Linear(8, 4)
    theirs = copy.deepcopy(ours)
    mine = BlockAdamW(ours.parameters(), [list(ours.parameters())], BAdam(switch_every=2))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(7):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_block_is_what_adamw_makes_of_it_while_the_others_stay():
    net = Net()
    reference = copy.deepcopy(net)
    optimizer = of(net, BAdam(switch_every=3, order="ascending"), lr=1e-2, weight_decay=0.1)
    for block in blocks_of(reference).values():  # embedding, layer 0, layer 1, head
        fresh = torch.optim.AdamW(block, lr=1e-2, weight_decay=0.1)
        train(reference, fresh, 3)
        train(net, optimizer, 3)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))


def test_the_blocks_are_what_repeats_and_what_lies_around():
    net = Net()
    names = {parameter: name for name, parameter in net.named_parameters()}
    found = {block: [names[p] for p in members] for block, members in blocks_of(net).items()}
    assert found == {
        "before": ["embed.weight", "embed.bias"],
        "layers.0": ["layers.0.0.weight", "layers.0.0.bias"],
        "layers.1": ["layers.1.0.weight", "layers.1.0.bias"],
        "after": ["head.weight", "head.bias"],
    }
    assert list(blocks_of(nn.Linear(2, 2))) == ["before"]


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_every_block_has_its_turn_in_each_pass(order):
    config = BAdam(switch_every=2, order=order)
    turns = [config.block_at(step, 5) for step in range(20)]
    assert turns[::2] == turns[1::2]
    assert sorted(turns[:10:2]) == sorted(turns[10::2]) == list(range(5))
    assert (turns[:10] == turns[10:]) == (order != "random")


def test_gradients_are_computed_for_the_block_alone():
    net = Net()
    optimizer = of(net, BAdam(switch_every=1, order="descending"))
    train(net, optimizer, 1)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "layers.1.0.weight",
        "layers.1.0.bias",
    ]
    assert all(p.grad is None for p in net.head.parameters())
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_state_has_the_bytes_of_the_estimate(dtype):
    net = Net(dtype)
    optimizer = of(net, BAdam(order="ascending"))
    train(net, optimizer, 1)
    block = [net.embed.weight, net.embed.bias]
    assert sum(t.nbytes for state in optimizer.state.values() for t in state.values()) == badam(block)


def test_half_precision_is_trained_in_a_float32_copy():
    """Steps below the last digit of bfloat16 add up, as they do in float32."""
    net, wide = Net(torch.bfloat16), Net(torch.bfloat16).float()
    optimizer = of(net, BAdam(switch_every=99, order="ascending"), lr=1e-5, weight_decay=0.0)
    before = net.embed.weight.detach().clone()
    train(net, optimizer, 60)
    train(wide, torch.optim.AdamW(wide.embed.parameters(), lr=1e-5, weight_decay=0.0), 60)
    moved = (net.embed.weight.detach().float() - before.float()).norm()
    expected = (wide.embed.weight.detach() - before.float()).norm()
    assert moved > 0.5 * expected  # rounded to bfloat16 after each of the steps, none would be seen
    kept = optimizer.state[net.embed.weight]["weight"]
    # Directions of Adam's first steps are signs: a tenth for those that noise of bfloat16 gradients turns.
    torch.testing.assert_close(kept - before.float(), wide.embed.weight.detach() - before.float(), rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_it_resumes_bit_for_bit_within_a_block_and_between_two(stop, dtype):
    straight, config = Net(dtype), BAdam(switch_every=3)
    train(straight, of(straight, config), 9)
    net = Net(dtype)
    optimizer = of(net, config)
    train(net, optimizer, stop)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), Net(dtype)
    again = of(resumed, config)
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 9 - stop)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_state_with_other_values_is_refused():
    net = Net()
    saved = of(net, BAdam()).state_dict()
    with pytest.raises(OptimizerError, match=r"'switch_every': 100.*this one has \{'switch_every': 7"):
        of(net, BAdam(switch_every=7)).load_state_dict(saved)


@pytest.mark.parametrize("values", [{"switch_every": 0}, {"switch_every": True}, {"order": "up"}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="of BAdam must be"):
        BAdam(**values)
