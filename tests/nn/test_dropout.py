"""Dropout that keeps no mask: what is drawn, and that it is the same when it is drawn again."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject
from lightning_lora.nn import dropout
from tests.conftest import randomize

CPU = torch.device("cpu")
SIX_SIGMA = 6  # one test in 10^9 fails by chance


def kept(p: float, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dropout.kept(torch.tensor(seed), torch.Size(shape), p, dtype, CPU)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_that_of_independent_draws(p):
    """Of the whole, of each column and of each byte of a word."""
    n, columns = 2048, 512
    ones = kept(p, n, columns, seed=7)
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    spread = math.sqrt(p * (1 - p))
    assert abs(ones.mean().item() - (1 - p)) <= SIX_SIGMA * spread / math.sqrt(n * columns)
    by_lane = ones.view(-1, 4).mean(0)
    assert (by_lane - (1 - p)).abs().max() <= SIX_SIGMA * spread / math.sqrt(n * columns / 4)
    by_column = ones.mean(0) - (1 - p)
    assert by_column.square().mean().sqrt() == pytest.approx(spread / math.sqrt(n), rel=0.2)  # 512 columns: 6 x 3%


@pytest.mark.parametrize("step", [1, 2, 3, 4, 512])
def test_neighbours_are_independent(step):
    left, right = kept(0.5, 2**20, seed=5)[step:], kept(0.5, 2**20, seed=5)[:-step]
    correlation = 4 * ((left - 0.5) * (right - 0.5)).mean()
    assert abs(correlation.item()) <= SIX_SIGMA / math.sqrt(2**20)


def test_a_rate_between_two_steps_of_the_draw_is_met_on_average():
    """2^-17 is far below a step of 1/256: most masks have no zero or one, and the rate over many masks is right."""
    p, masks, n = 2**-17, 400, 2**16
    zeros = torch.tensor([n - kept(p, n, seed=seed).sum().item() for seed in range(masks)])
    deviation = math.sqrt(masks * n * p)  # each mask: Poisson with mean 1/2
    assert abs(zeros.sum().item() - masks * n * p) <= SIX_SIGMA * deviation
    assert zeros.max() > 0


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0, 4), (2, 3, 5)])
def test_any_shape_and_dtype(shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ones = kept(0.5, *shape, dtype=dtype)
        assert ones.shape == shape
        assert ones.dtype == dtype
        assert torch.equal(ones.float(), kept(0.5, *shape))


def test_every_piece_of_a_long_mask_has_its_own_draw():
    """A byte is compared with 76.8 of 256, so the last fifth of a step is dropped element by element in all pieces."""
    pieces = kept(0.3, 3 * 2**20 + 12345, seed=3).split(2**20)
    for index, piece in enumerate(pieces):
        assert abs(piece.mean().item() - 0.7) <= SIX_SIGMA * math.sqrt(0.21 / len(piece))
        for other in pieces[:index]:
            together = ((piece - 0.7) * (other[: len(piece)] - 0.7)).mean() / 0.21
            assert abs(together.item()) <= SIX_SIGMA / math.sqrt(len(piece))


def test_masks_of_seeds_beside_each_other_are_independent():
    n = 2**18
    masks = torch.stack([kept(0.5, n, seed=seed) for seed in range(8)]) - 0.5
    correlations = 4 * masks @ masks.T / n - torch.eye(8)
    assert correlations.abs().max() <= SIX_SIGMA / math.sqrt(n)


def test_no_frequency_stands_out():
    """Of independent draws, power over the mean is exponential: above 30 in one of 10^13."""
    n = 2**20
    for p in (0.05, 0.5):
        power = torch.fft.rfft(kept(p, n, seed=9).double() - (1 - p)).abs().square() / (n * p * (1 - p))
        assert power[1:-1].max() <= 30


def test_the_bytes_that_are_compared_are_uniform():
    """Chi-square over the 256 steps of ``p``, of each byte of a word: the mask at each step is one bit of it."""
    n = 2**16
    at_least = torch.stack([kept(level / 256, 4 * n, seed=2).view(-1, 4).sum(0) for level in range(256)])
    found = at_least - torch.cat([at_least[1:], torch.zeros(1, 4)])
    chi = ((found - n / 256).square() / (n / 256)).sum(0)
    assert ((chi - 255).abs() <= SIX_SIGMA * math.sqrt(2 * 255)).all()


def test_the_mask_is_the_same_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        found = []
        for torch_threads in (1, 2, 3):
            torch.set_num_threads(torch_threads)
            found.append(kept(0.3, 2**20 + 77, seed=4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nearly_all_can_be_dropped():
    assert kept(1 - 1e-9, 1000).sum() == 0  # by chance one in a million times


def model(p: float) -> nn.Module:
    return randomize(inject(nn.Sequential(nn.Linear(16, 12)), "0", LoRAConfig(r=2, dropout=p))).train()


def test_a_call_takes_its_mask_from_the_global_seed():
    net, x = model(0.5), torch.randn(8, 16)
    torch.manual_seed(11)
    first, second = net(x), net(x)
    torch.manual_seed(11)
    assert torch.equal(net(x), first)
    assert torch.equal(net(x), second)
    assert not torch.equal(first, second)


def test_the_backward_pass_and_the_number_of_elements_leave_the_global_generator_alone():
    """A run then draws the same numbers whatever the batch, and a resumed one goes on where it was."""
    net = model(0.5)
    states = []
    for rows in (1, 64):
        torch.manual_seed(11)
        net(torch.ones(rows, 16, requires_grad=True)).sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_draws_the_same_mask_again(reentrant):
    net, x = model(0.5), torch.randn(8, 16, requires_grad=True)
    found = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        net.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
