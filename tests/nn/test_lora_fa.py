"""LoRA-FA: LoRA's mathematics with a frozen ``A``, and what is not kept for the backward pass."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAFAConfig, TargetError, activate, inject
from tests.conftest import randomize, relative_difference

N, IN, OUT, R = 40, 24, 20, 4
SCALE = 3 / 4


def model(**settings) -> nn.Module:
    host = nn.Sequential(nn.Linear(IN, OUT, dtype=torch.float64))
    return randomize(inject(host, "0", LoRAFAConfig(**{"r": R, "alpha": 3, **settings})))


def test_output_and_gradient_equal_the_closed_form():
    net = model()
    base, adapter = net[0].base_layer, net[0].adapter("default")
    x, grad = torch.randn(N, IN, dtype=torch.float64), torch.randn(N, OUT, dtype=torch.float64)
    y = net(x)
    y.backward(grad)
    expected = base(x) + SCALE * x @ adapter.lora_A.T @ adapter.lora_B.T
    assert relative_difference(y, expected) <= 1e-12
    assert relative_difference(adapter.lora_B.grad, SCALE * grad.T @ x @ adapter.lora_A.T) <= 1e-12
    assert adapter.lora_A.grad is None


def test_a_stays_as_it_was_drawn_whatever_trains():
    net = model()
    adapter = net[0].adapter("default")
    before = adapter.lora_A.clone()
    assert before.std() > 0
    activate(net, "default")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        net(torch.randn(N, IN, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    assert torch.equal(adapter.lora_A, before)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.adapters.default.lora_B"]


@pytest.mark.parametrize("inside", [False, True], ids=["first layer", "inside a network"])
def test_nothing_of_the_inputs_size_is_kept_but_what_a_frozen_layer_keeps_too(inside):
    net = model()
    x = torch.randn(N, IN, dtype=torch.float64, requires_grad=inside)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        net(x)
    assert (N, R) in kept
    assert [shape for shape in kept if N in shape] == [(N, R)]


def test_it_is_refused_over_an_embedding_by_name():
    with pytest.raises(TargetError, match="0: LoRA-FA freezes a random A, and over an embedding"):
        inject(nn.Sequential(nn.Embedding(12, 8)), "0", LoRAFAConfig(r=2))
