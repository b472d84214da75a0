"""The Triton kernels of NF4 under Triton's interpreter: run by test_nf4_triton.py, see interpreted.py."""

import types

import pytest
import torch

from lightning_lora.kernels import four_bits, nf4_triton
from lightning_lora.kernels.choice import agrees
from lightning_lora.kernels.packed import DTYPES, Packed
from tests.kernels import interpreted  # noqa: F401 (before the kernel is first run)
from tests.kernels.nf4_weights import in_float64, pack

SHAPES = [(1, 1), (1, 2), (7, 1), (33, 71), (65, 130), (129, 64)]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
# A product of two roundings in float32 and one to the result; a level and a maximum are exact there.
ROUNDING = {torch.float32: 3 * 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def kernel(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, float("nan"), dtype=dtype)
    nf4_triton.dequantize(packed, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_equals_bitsandbytes_bit_for_bit_and_float64_but_for_rounding(shape, nested, dtype):
    packed = pack(torch.randn(shape), 64, nested=nested)
    found = kernel(packed, shape, dtype)
    assert torch.equal(found, four_bits.dequantize(packed, shape, dtype, "nf4"))
    exact = in_float64(packed, shape)
    # float16 has no exponent for the smallest weights; half its last step there is 2 ** -25
    assert torch.allclose(found.double(), exact, rtol=ROUNDING[dtype], atol=2.0**-25 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_equals_bitsandbytes_bit_for_bit(block_size, nested):
    """The last block is incomplete; with 32 there are more than 256 maxima, and so two nested ones."""
    packed = pack(torch.randn(96, 90) * torch.rand(96, 1).exp(), block_size, nested=nested)
    assert torch.equal(
        kernel(packed, (96, 90), torch.bfloat16), four_bits.dequantize(packed, (96, 90), torch.bfloat16, "nf4")
    )


def test_codes_that_are_not_aligned_to_words_are_read_by_bytes():
    packed = pack(torch.randn(16, 64), 64, nested=True)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.codes])[1:]
    assert shifted.data_ptr() % 4
    moved = packed._replace(codes=shifted)
    assert torch.equal(kernel(moved, (16, 64), torch.float32), kernel(packed, (16, 64), torch.float32))


def test_an_empty_weight_is_nothing_to_do():
    empty = torch.empty(0)
    packed = Packed(empty.to(torch.uint8), empty, empty, empty, 64)
    assert kernel(packed, (0, 4), torch.float32).shape == (0, 4)


def test_nothing_is_written_past_the_end():
    packed = pack(torch.randn(3, 5), 64, nested=True)
    around = torch.full((64,), 7.0)
    nf4_triton.dequantize(packed, around[:15])
    assert torch.equal(around[15:], torch.full((49,), 7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "rank"), [((64, 128), 16), ((65, 136), 3), ((3, 6), 1), ((70, 258), 40)])
def test_an_update_is_added_in_float32_and_rounded_once(shape, rank, nested, dtype):
    packed = pack(torch.randn(shape), 64, nested=nested)
    lora_A, lora_B = torch.randn(rank, shape[1]), torch.randn(shape[0], rank)
    found = torch.full(shape, float("nan"), dtype=dtype)
    nf4_triton.dequantize_plus(packed, found, lora_A, lora_B, 0.3)
    base, size = in_float64(packed, shape), 0.3 * lora_B.double().abs() @ lora_A.double().abs()
    exact = base + 0.3 * lora_B.double() @ lora_A.double()
    # The sums in float32: rank + 4 roundings of what has been added up; then one to the result.
    bound = (rank + 4) * 2.0**-24 * (size + base.abs()) + ROUNDING[dtype] * exact.abs() + 2.0**-25
    assert ((found.double() - exact).abs() <= bound).all()


def test_the_check_before_first_use_finds_a_kernel_that_computes_something_else():
    cpu = torch.device("cpu")
    assert all(agrees(nf4_triton, cpu, dtype, nested=nested) for dtype in DTYPES for nested in (True, False))

    def off_by_one_bit(packed, out):
        nf4_triton.dequantize(packed, out)
        out.view(-1)[-1:].view(torch.int32).add_(1)

    wrong = types.SimpleNamespace(dequantize=off_by_one_bit)
    assert not agrees(wrong, cpu, torch.float32, nested=True)
