"""NormalFloat of two and three bits: levels against the closed form, codes without a wasted bit."""

import math

import pytest
import torch

from lightning_lora.kernels import bits as packing
from lightning_lora.kernels import normal_float
from lightning_lora.kernels.codebook import BITS, dequantize_codebook
from lightning_lora.kernels.packed import DTYPES, Packed

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def quantile(p: float) -> float:
    """Of the standard Gaussian, by bisection of its distribution function."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / 2**0.5)) / 2 < p else (low, middle)
    return low


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_closed_form(bits):
    n = 2**bits
    o = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    positive = [quantile(o + (0.5 - o) * i / (n // 2)) for i in range(n // 2)]
    negative = [-quantile(o + (0.5 - o) * i / (n // 2 - 1)) for i in range(n // 2 - 1)]
    expected = sorted([*negative, 0.0, *positive])
    assert normal_float.levels(bits) == pytest.approx([level / positive[0] for level in expected], abs=1e-13)


def test_with_four_bits_they_are_the_levels_of_nf4():
    assert normal_float.levels(4) == pytest.approx(NF4, abs=2e-7)  # the published ones were computed from o = 0.9677083


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 64, 1000])
def test_codes_are_packed_without_a_wasted_bit(bits, count):
    codes = torch.randint(2**bits, (count,), dtype=torch.int32)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == number
    items = packing.items(packed, bits).tolist()
    assert [items[i // 4] >> bits * (i % 4) & (2**bits - 1) for i in range(count)] == codes.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 71), (64, 128)])
def test_weights_are_the_nearest_levels_of_their_block(shape, bits, dtype):
    weight, block = torch.randn(shape), 64
    codes, absmax = normal_float.quantize(weight.view(-1), bits, block)
    found = dequantize_codebook(Packed(codes, absmax, torch.empty(0), torch.empty(0), block), f"nf{bits}", shape, dtype)
    table = torch.tensor(normal_float.levels(bits))
    for flat, values in zip(weight.view(-1).split(block), found.view(-1).split(block), strict=True):
        choices = table * flat.abs().max()
        nearest = choices[(flat[:, None] - choices).abs().argmin(1)]
        assert torch.equal(values, nearest.to(dtype))
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_blocks_of_zeros_stay_zero():
    codes, absmax = normal_float.quantize(torch.zeros(96), 3, 32)
    packed = Packed(codes, absmax, torch.empty(0), torch.empty(0), 32)
    assert not dequantize_codebook(packed, "nf3", (96,), torch.float32).any()


@pytest.mark.parametrize("codebook", BITS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_that_do_not_fit_are_refused_before_reading_past_the_end(codebook, device):
    empty, codes = torch.empty(0, device=device), torch.zeros(11, dtype=torch.uint8, device=device)
    packed = Packed(codes, torch.ones(1, device=device), empty, empty, 64)
    with pytest.raises(RuntimeError, match=rf"\(8, 8\) in {BITS[codebook]} bits and blocks of 64 has"):
        dequantize_codebook(packed, codebook, (8, 8), torch.float32)


@pytest.mark.parametrize("codebook", BITS)
@pytest.mark.parametrize("shape", [(16, 64), (3, 5)])
def test_torch_can_trace_the_operator(codebook, shape):
    codes = torch.randint(256, (math.ceil(math.prod(shape) * BITS[codebook] / 8),), dtype=torch.uint8)
    packed = Packed(codes, torch.rand(math.ceil(math.prod(shape) / 64)), torch.empty(0), torch.empty(0), 64)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.lightning_lora.dequantize_codebook.default
    torch.library.opcheck(operator, (*packed, shape, torch.bfloat16, codebook), test_utils=checks)
