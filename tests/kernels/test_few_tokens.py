"""Products from the codes themselves: the same function, and only where they were measured to be faster."""

import pytest
import torch

from lightning_lora.kernels import few_tokens
from lightning_lora.kernels.few_tokens import are_few, gemm_4bit
from tests.conftest import relative_difference
from tests.kernels.nf4_weights import in_float64, pack


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("leading", [(1,), (2, 3), ()])
def test_the_product_is_that_of_the_weight(leading, nested, bias):
    packed = pack(torch.randn(33, 70), 64, nested=nested)
    x, b = torch.randn(*leading, 70), torch.randn(33) if bias else None
    expected = x.double() @ in_float64(packed, (33, 70)).T + (0 if b is None else b.double())
    assert (
        relative_difference(gemm_4bit(x, packed, (33, 70), b, "nf4").double(), expected) <= 1e-6
    )  # float32 sums of 70


def test_no_device_takes_it_that_was_not_measured():
    assert few_tokens.MOST_TOKENS == {}
    with torch.no_grad():
        assert not are_few(torch.randn(1, 8))


def test_the_cpu_never_takes_it(monkeypatch):
    monkeypatch.setitem(few_tokens.MOST_TOKENS, (9, 0), 8)
    with torch.no_grad():
        assert not are_few(torch.randn(1, 8))
