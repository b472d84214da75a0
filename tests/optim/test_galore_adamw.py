"""GaLore is AdamW between two projections, held to the paper's algorithm in float64."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_lora import OptimizerError
from lightning_lora.estimation.optimizers import galore_adamw
from lightning_lora.optim.galore_adamw import GaLore, GaLoreAdamW, leading_directions


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def reference(weight, gradients, config, *, lr=1e-2, wd=0.1, betas=(0.9, 0.999), eps=1e-8):
    """Algorithm 2 of the paper with singular vectors from LAPACK, one line per equation."""
    w, tall = weight.clone(), weight.shape[0] > weight.shape[1]
    m = v = 0.0
    for t, gradient in enumerate(gradients):
        g = gradient.T if tall else gradient
        if t % config.update_proj_gap == 0:
            p = torch.linalg.svd(g, full_matrices=False).U[:, : config.rank]
            # A projection of moments kept over a change of basis depends on the signs of the basis
            p = p * leading_directions(g, config.rank).flip(1).mul(p).sum(0).sign()
        r = p.T @ g
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r * r
        n = (m / (1 - betas[0] ** (t + 1))) / ((v / (1 - betas[1] ** (t + 1))).sqrt() + eps)
        step = config.scale * p @ n
        w = (1 - lr * wd) * w - lr * (step.T if tall else step)
    return w


def run(weight, gradients, config, **values):
    parameter = nn.Parameter(weight.clone())
    optimizer = GaLoreAdamW([{"params": [parameter], **values}], config)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_an_update_is_that_of_the_papers_algorithm(shape):
    config = GaLore(rank=3, update_proj_gap=2, scale=0.5)
    weight, gradients = draw(*shape), [draw(*shape, seed=s) for s in range(1, 6)]
    found, _ = run(weight, gradients, config, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(found, reference(weight, gradients, config), rtol=1e-9, atol=1e-12)


def test_gradients_of_that_rank_lose_nothing():
    """With an eps beyond all moments AdamW is linear, so projecting there and back changes nothing but the scale."""
    factors = draw(6, 2), [draw(2, 10, seed=s) for s in range(1, 5)]
    gradients = [factors[0] @ each for each in factors[1]]
    weight = draw(6, 10, seed=9)
    found, _ = run(weight, gradients, GaLore(rank=2, scale=1.0), lr=1e6, weight_decay=0.0, eps=1e8)
    plain = nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([plain], lr=1e6, weight_decay=0.0, eps=1e8)
    for gradient in gradients:
        plain.grad = gradient
        adamw.step()
    torch.testing.assert_close(found, plain.detach(), rtol=1e-6, atol=1e-6)  # moments beside eps: 1 / 1e8


@pytest.mark.parametrize("shape", [(4, 9), (9,), (3, 3, 3)])
def test_what_is_not_projected_is_adamws_bit_for_bit(shape):
    weight, gradients = draw(*shape), [draw(*shape, seed=s) for s in range(1, 5)]
    found, _ = run(weight, gradients, GaLore(rank=4), lr=1e-2, weight_decay=0.1)
    plain = nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    for gradient in gradients:
        plain.grad = gradient.clone()
        adamw.step()
    assert torch.equal(found, plain.detach())


@pytest.mark.parametrize("magnitude", [1.0, 1e-30])
def test_directions_are_the_leading_singular_vectors(magnitude):
    matrix = draw(12, 40) * torch.linspace(3, 0.3, 12, dtype=torch.float64)[:, None]
    mine = leading_directions((magnitude * matrix).float(), 4).double()
    theirs = torch.linalg.svd(matrix).U[:, :4]
    # Projectors onto the span; float32, and squares: 1e-7 over the gap of the squared singular values
    torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_has_the_bytes_of_the_estimate(dtype):
    config = GaLore(rank=4)
    parameters = [nn.Parameter(draw(*shape, dtype=dtype)) for shape in [(6, 10), (10, 6), (4, 9), (7,)]]
    optimizer = GaLoreAdamW(parameters, config)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert held == galore_adamw(parameters, config)
    counts, elements = 4 * len(parameters), 2 * (6 * 4 + 2 * 4 * 10) + 2 * (4 * 9 + 7)  # M R + 2 R N, or two moments
    assert held == elements * dtype.itemsize + counts


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_it_resumes_bit_for_bit(stop):
    config = GaLore(rank=3, update_proj_gap=2)
    weight, gradients = draw(6, 10, dtype=torch.float32), [draw(6, 10, seed=s, dtype=torch.float32) for s in range(5)]
    straight, _ = run(weight, gradients, config)
    half, optimizer = run(weight, gradients[:stop], config)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    parameter = nn.Parameter(half.clone())
    again = GaLoreAdamW([parameter], config)
    again.load_state_dict(torch.load(file, weights_only=True))
    for gradient in gradients[stop:]:
        parameter.grad = gradient
        again.step()
    assert torch.equal(parameter.detach(), straight)


def test_a_state_with_other_projections_is_refused():
    _, optimizer = run(draw(6, 10), [draw(6, 10)], GaLore(rank=3))
    with pytest.raises(OptimizerError, match=r"'rank': 3.*this one has \{'rank': 2"):
        GaLoreAdamW([nn.Parameter(draw(6, 10))], GaLore(rank=2)).load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("values", [{"rank": 0}, {"update_proj_gap": 1.5}, {"scale": 0.0}, {"scale": float("nan")}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="of GaLore must be"):
        GaLore(**values)
