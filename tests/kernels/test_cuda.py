"""The kernels on a GPU. They need one: run ``pytest -m gpu`` on a machine that has it."""

import warnings

import pytest
import torch

from lightning_lora import NF2Config, NF3Config
from lightning_lora.kernels import choice, four_bits, normal_float
from lightning_lora.kernels.codebook import dequantize_codebook
from lightning_lora.kernels.nf4 import dequantize_nf4, dequantize_nf4_plus
from lightning_lora.kernels.packed import DTYPES, Packed
from lightning_lora.quantization.formats import quantized_linear
from tests.kernels.nf4_weights import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(shape, block_size=64, *, nested=True):
    return pack(torch.randn(shape, device="cuda"), block_size, nested=nested)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_triton_kernel_is_used_and_nothing_is_warned_of(dtype, nested):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.triton_kernels(on_gpu((8, 64), nested=nested), dtype) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [64, 512, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (33, 71), (96, 128), (513, 1026), (1024, 4096)])
def test_weights_equal_bitsandbytes_bit_for_bit(shape, block_size, nested, dtype):
    packed = on_gpu(shape, block_size, nested=nested)
    expected = four_bits.dequantize(packed, shape, dtype, "nf4")
    assert torch.equal(dequantize_nf4(packed, shape, dtype), expected)


def test_the_cpu_gives_the_same_bits():
    packed = on_gpu((64, 130))
    there = Packed(*(tensor.cpu() for tensor in packed[:4]), 64)
    for dtype in DTYPES:
        assert torch.equal(dequantize_nf4(packed, (64, 130), dtype).cpu(), dequantize_nf4(there, (64, 130), dtype))


def test_codes_that_are_not_aligned_to_words_are_read_by_bytes():
    packed = on_gpu((16, 64))
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8, device="cuda"), packed.codes])[1:]
    moved = packed._replace(codes=shifted)
    assert torch.equal(
        dequantize_nf4(moved, (16, 64), torch.bfloat16), dequantize_nf4(packed, (16, 64), torch.bfloat16)
    )


def test_a_weight_of_more_than_two_billion_elements_is_whole():
    """Compared piece by piece; the last block of codes differs from the others."""
    count, half = 2**31 + 4096, torch.float16
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    codes = torch.zeros(count // 2, dtype=torch.uint8, device="cuda")
    codes[-2048:] = 0xFF
    absmax = torch.rand(count // 4096, device="cuda")
    empty = torch.empty(0, device="cuda")
    found = dequantize_nf4(Packed(codes, absmax, empty, empty, 4096), (1, count), half).view(-1, 4096)
    assert torch.equal(found[:-1, 0], -absmax[:-1].half())
    assert torch.equal(found[-1], absmax[-1].half().expand(4096))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "rank"), [((64, 128), 16), ((65, 136), 3), ((513, 1026), 40), ((7, 33), 2)])
def test_an_update_is_added_in_float32_and_rounded_once(shape, rank, factors, dtype):
    packed = on_gpu(shape)
    lora_A = torch.randn(rank, shape[1], device="cuda", dtype=factors)
    lora_B = torch.randn(shape[0], rank, device="cuda", dtype=factors)
    found = dequantize_nf4_plus(packed, shape, dtype, lora_A, lora_B, 0.3)
    base = dequantize_nf4(packed, shape, torch.float32).double()
    update, size = 0.3 * lora_B.double() @ lora_A.double(), 0.3 * lora_B.double().abs() @ lora_A.double().abs()
    step = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    bound = step * (base + update).abs() + (rank + 8) * 2.0**-24 * (base.abs() + size) + 2.0**-25
    assert ((found.double() - base - update).abs() <= bound).all()


def test_it_is_captured_in_a_cuda_graph_and_replayed_with_new_codes():
    packed = on_gpu((256, 256))
    dequantize_nf4(packed, (256, 256), torch.bfloat16)  # the first call compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequantize_nf4(packed, (256, 256), torch.bfloat16)
    packed.codes.copy_(packed.codes.flip(0))
    graph.replay()
    assert torch.equal(out, four_bits.dequantize(packed, (256, 256), torch.bfloat16, "nf4"))


@pytest.mark.parametrize("config", [NF3Config, NF2Config])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 71), (513, 1026), (1024, 4096)])
def test_normal_float_of_two_and_three_bits_equals_plain_torch_bit_for_bit(shape, nested, dtype, config):
    layer = torch.nn.Linear(shape[1], shape[0], bias=False, device="cuda")
    packed = quantized_linear(layer, config(double_quant=nested)).packed.as_floats()
    assert choice.triton_kernels(packed, dtype, config.name) is not None
    expected = normal_float.dequantize(packed, config.bits, shape, dtype)
    assert torch.equal(dequantize_codebook(packed, config.name, shape, dtype), expected)
