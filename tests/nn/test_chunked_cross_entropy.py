"""The loss without its logits: torch's own loss in float64 is the reference."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, chunked_cross_entropy, inject, quantize
from tests.conftest import randomize, relative_difference

TOKENS, WIDTH, VOCABULARY = 37, 16, 50


def problem(dtype=torch.float64, ignored=5):
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[torch.randperm(TOKENS)[:ignored]] = -100
    return hidden, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_loss_and_gradients_are_torchs(chunk, ignored, smoothing):
    hidden, labels = problem(ignored=ignored)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(F.linear(hidden, weight), labels, label_smoothing=smoothing)
    found = chunked_cross_entropy(hidden, weight, labels, chunk=chunk, label_smoothing=smoothing)
    assert relative_difference(found, expected) <= 1e-14
    # Another factor in front of it, as gradient accumulation and loss scaling put there.
    for ours, theirs in zip(gradients(3 * found, hidden, weight), gradients(3 * expected, hidden, weight), strict=True):
        assert relative_difference(ours, theirs) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_to_float64_as_torchs(dtype):
    hidden, labels = problem(torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    low = hidden.detach().to(dtype).requires_grad_()
    exact_hidden, exact_weight = low.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(exact_hidden, exact_weight), labels)
    found = chunked_cross_entropy(low, weight, labels, chunk=8)
    assert found.dtype == torch.float32
    # Logits are rounded to the dtype, whose step is 2 ** -8 or less; a few of these add up in a gradient.
    assert relative_difference(found, exact) <= 2**-8
    for ours, theirs in zip(gradients(found, low, weight), gradients(exact, exact_hidden, exact_weight), strict=True):
        assert ours.dtype == dtype
        assert relative_difference(ours.double(), theirs) <= 4 * 2**-8


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_an_adapted_head_trains_its_adapter_alone(storage):
    model = inject(nn.Sequential(nn.Linear(WIDTH, VOCABULARY)), "0", LoRAConfig(r=4))
    randomize(quantize(model) if storage == "nf4" else model)
    hidden, labels = problem(torch.float32)
    adapter = model[0].adapter("default")
    trained = (hidden, adapter.lora_A, adapter.lora_B)
    expected = gradients(F.cross_entropy(model(hidden), labels), *trained)
    found = gradients(chunked_cross_entropy(hidden, model[0], labels, chunk=8), *trained)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_difference(ours, theirs) <= 1e-5  # sums in another order
    assert all(p.grad is None for p in model.parameters())


def test_leading_axes_bias_and_a_head_that_is_frozen():
    head = nn.Linear(WIDTH, VOCABULARY).double().requires_grad_(False)
    hidden = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (3, 4))
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    found = chunked_cross_entropy(hidden, head, labels, chunk=5)
    assert relative_difference(found, expected) <= 1e-14
    assert relative_difference(*(gradients(loss, hidden)[0] for loss in (found, expected))) <= 1e-13
    with torch.no_grad():
        assert relative_difference(chunked_cross_entropy(hidden, head, labels, chunk=5), expected) <= 1e-14


def test_other_labels_can_be_the_ignored_ones_and_none_may_count():
    hidden, labels = problem(ignored=0)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    other = int(labels[0])
    expected = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=other)
    assert relative_difference(chunked_cross_entropy(hidden, weight, labels, ignore_index=other), expected) <= 1e-14
    assert chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100)).isnan()
    assert chunked_cross_entropy(hidden[:0], weight, labels[:0]).isnan()


class Largest(TorchDispatchMode):
    """The most elements a tensor had that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        made = operation(*arguments, **(settings or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_is_larger_than_the_logits_of_a_chunk():
    tokens, width, vocabulary, chunk = 256, 8, 1000, 16
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with Largest() as chunked:
        chunked_cross_entropy(hidden, weight, labels, chunk=chunk).backward()
    with Largest() as whole:
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    assert whole.elements == tokens * vocabulary
    assert chunked.elements == chunk * vocabulary


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    kept = []
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        loss = chunked_cross_entropy(hidden, weight, torch.randint(1000, (64,)), chunk=64)
    in_the_end = kept[-2:]  # the count and the gradient of hidden; what came before went with its chunk
    loss.backward()
    assert in_the_end == [1, 64 * 8]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\) do not fit hidden of shape \(4, 16\)"),
        ({"chunk": 0}, "at least 1 token"),
        ({"label_smoothing": 1.5}, "within 0 and 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(settings, said):
    settings = {"labels": torch.zeros(4, dtype=torch.long)} | settings
    with pytest.raises(ValueError, match=said):
        chunked_cross_entropy(torch.randn(4, WIDTH), torch.randn(VOCABULARY, WIDTH), **settings)
