"""The operator: bit-equal to bitsandbytes on this machine, traceable, and strict about sizes."""

import pytest
import torch
from bitsandbytes import functional as bnb

from lightning_lora.kernels.nf4 import dequantize_nf4, dequantize_nf4_plus
from lightning_lora.kernels.packed import DTYPES, Packed
from tests.kernels.nf4_weights import in_float64, pack

SHAPES = [(1, 1), (1, 2), (3, 5), (33, 70), (33, 71), (64, 128), (1, 4097)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_every_size_are_the_equations_rounded_once(shape, block_size, nested, dtype):
    packed = pack(torch.randn(shape), block_size, nested=nested)
    found = dequantize_nf4(packed, shape, dtype)
    assert found.shape == shape
    assert found.is_contiguous()
    # Each of two products and a sum in float32 rounds once, and so does the result.
    step = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    exact = in_float64(packed, shape)
    assert ((found.double() - exact).abs() <= (step + 2.0**-22) * exact.abs() + 2.0**-25).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_weights_are_those_of_bitsandbytes_function_bit_for_bit(block_size, nested, dtype):
    weight = torch.randn(37, 130, dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    packed = pack(weight, block_size, nested=nested)
    assert torch.equal(dequantize_nf4(packed, weight.shape, dtype), bnb.dequantize_4bit(codes, state))


def test_an_empty_weight_stays_empty():
    empty = torch.empty(0)
    packed = Packed(empty.to(torch.uint8), empty, empty, empty, 64)
    assert dequantize_nf4(packed, (0, 4), torch.bfloat16).shape == (0, 4)


def test_constants_are_read_from_their_bits_as_well():
    packed = pack(torch.randn(16, 64), 64, nested=True)
    bits = packed._replace(nested_absmax=packed.nested_absmax.view(torch.int32), offset=packed.offset.view(torch.int32))
    assert torch.equal(dequantize_nf4(bits, (16, 64), torch.float32), dequantize_nf4(packed, (16, 64), torch.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"codes": torch.zeros(511, dtype=torch.uint8)},
            r"has \(512, 16, 1, 1\) bytes of codes.*got \(511, 16, 1, 1\)",
        ),
        ({"absmax": torch.zeros(15, dtype=torch.uint8)}, r"got \(512, 15, 1, 1\)"),
        ({"nested_absmax": torch.zeros(0)}, r"got \(512, 16, 0, 1\)"),
        ({"offset": torch.zeros(0)}, r"got \(512, 16, 1, 0\)"),
        ({"codes": torch.zeros(512)}, "packed codes are uint8"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_that_do_not_fit_are_refused_before_a_kernel_reads_past_the_end(changes, said, device):
    packed = pack(torch.randn(16, 64), 64, nested=True)._replace(**changes)
    moved = Packed(*(tensor.to(device) for tensor in packed[:4]), 64)
    with pytest.raises(RuntimeError, match=said):
        dequantize_nf4(moved, (16, 64), torch.float32)


def test_a_dtype_that_is_no_choice_is_refused():
    with pytest.raises(RuntimeError, match=r"become one of.*got torch.uint8 and torch.float64"):
        dequantize_nf4(pack(torch.randn(2, 64), 64, nested=True), (2, 64), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("factors", DTYPES)
def test_an_update_is_summed_in_float32_and_rounded_once_however_small(size, dtype, factors):
    packed = pack(torch.randn(33, 70), 64, nested=True)
    lora_A, lora_B = torch.randn(4, 70).to(factors), torch.randn(33, 4).to(factors)
    found = dequantize_nf4_plus(packed, (33, 70), dtype, lora_A, lora_B, 0.5 * size)
    base = dequantize_nf4(packed, (33, 70), torch.float32).double()
    update = 0.5 * size * lora_B.double() @ lora_A.double()
    # The sum in float32 differs from the exact one by its own roundings and now and then falls on the other side of
    # half a step: one step of the result, and eight of float32.
    step = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    terms = base.abs() + 0.5 * size * lora_B.double().abs() @ lora_A.double().abs()
    assert (
        (found.double() - base - update).abs() <= step * (base + update).abs() + 8 * 2.0**-24 * terms + 2**-25
    ).all()


def test_an_update_far_below_the_weights_precision_arrives_whole_on_average():
    """Added to a bfloat16 weight it is lost: a tenth of it remains where it is ten thousand times smaller."""
    weight = torch.randn(512, 512)
    packed = pack(weight, 64, nested=True)
    lora_A, lora_B = torch.randn(1, 512), torch.randn(512, 1)
    update = 1e-4 * lora_B @ lora_A
    base = dequantize_nf4(packed, (512, 512), torch.float32)
    rounded = base.bfloat16()

    def arrived(found):
        return ((found.float() - base) * update).sum() / update.square().sum()

    fused = dequantize_nf4_plus(packed, (512, 512), torch.bfloat16, lora_A, lora_B, 1e-4)
    late = rounded + update.bfloat16()
    # Rounding noise of the weight, 2 ** -9 of it at most, over a quarter of a million weights: a few hundredths.
    assert arrived(fused).item() == pytest.approx(1.0, abs=0.1)
    assert arrived(late).item() - arrived(rounded).item() < 0.5


@pytest.mark.parametrize("bad", ["rank", "columns", "dtype"])
def test_factors_that_do_not_fit_are_refused(bad):
    packed = pack(torch.randn(4, 64), 64, nested=True)
    lora_A, lora_B = torch.randn(2, 65 if bad == "columns" else 64), torch.randn(4, 3 if bad == "rank" else 2)
    with pytest.raises(RuntimeError, match=r"factors \(O, R\) and \(R, I\) of one dtype; got"):
        dequantize_nf4_plus(packed, (4, 64), torch.float32, lora_A, lora_B.half() if bad == "dtype" else lora_B, 1.0)


@pytest.mark.parametrize("shape", [(16, 64), (3, 5)])
def test_torch_can_trace_the_operators(shape):
    packed = pack(torch.randn(shape), 64, nested=True)
    ops, checks = torch.ops.lightning_lora, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    factors = (torch.randn(2, shape[1]), torch.randn(shape[0], 2), 0.5)
    for operator, arguments in [
        (ops.dequantize_nf4.default, (*packed, shape, torch.bfloat16)),
        (ops.dequantize_nf4_plus.default, (*packed, shape, torch.bfloat16, *factors)),
    ]:
        torch.library.opcheck(operator, arguments, test_utils=checks)
