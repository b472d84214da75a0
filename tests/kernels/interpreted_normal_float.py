"""The Triton kernel of NF3 and NF2 under Triton's interpreter: run by test_nf4_triton.py, see interpreted.py."""

import types

import pytest
import torch

from lightning_lora import NF2Config, NF3Config
from lightning_lora.kernels import normal_float
from lightning_lora.kernels import normal_float_triton as kernels
from lightning_lora.kernels.choice import agrees
from lightning_lora.kernels.packed import DTYPES, Packed
from lightning_lora.quantization.formats import quantized_linear
from tests.kernels import interpreted  # noqa: F401 (before the kernel is first run)

SHAPES = [(1, 1), (1, 2), (7, 1), (3, 3), (33, 71), (65, 130), (129, 64)]
BITS = pytest.mark.parametrize("bits", [2, 3])


def pack(shape: tuple[int, ...], bits: int, *, nested: bool, block_size: int = 64) -> Packed:
    kind = {2: NF2Config, 3: NF3Config}[bits]
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    weight = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    return quantized_linear(layer, kind(block_size=block_size, double_quant=nested), weight=weight).packed.as_floats()


def kernel(packed: Packed, bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, float("nan"), dtype=dtype)
    kernels.dequantize(packed, out, bits=bits)
    return out


@BITS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_equals_plain_torch_bit_for_bit(shape, nested, dtype, bits):
    packed = pack(shape, bits, nested=nested)
    assert torch.equal(kernel(packed, bits, shape, dtype), normal_float.dequantize(packed, bits, shape, dtype))


@BITS
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_equals_plain_torch_bit_for_bit(block_size, nested, bits):
    """The last block is incomplete; with 32 there are more than 256 maxima, and so two nested ones."""
    packed = pack((96, 90), bits, nested=nested, block_size=block_size)
    found = kernel(packed, bits, (96, 90), torch.bfloat16)
    assert torch.equal(found, normal_float.dequantize(packed, bits, (96, 90), torch.bfloat16))


@BITS
def test_codes_anywhere_in_memory_are_read(bits):
    packed = pack((16, 64), bits, nested=True)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.codes])[1:]
    assert shifted.data_ptr() % 4
    moved = packed._replace(codes=shifted)
    assert torch.equal(kernel(moved, bits, (16, 64), torch.float32), kernel(packed, bits, (16, 64), torch.float32))


def test_an_empty_weight_is_nothing_to_do():
    empty = torch.empty(0)
    assert kernel(Packed(empty.to(torch.uint8), empty, empty, empty, 64), 3, (0, 4), torch.float32).shape == (0, 4)


@BITS
def test_nothing_is_written_past_the_end(bits):
    around = torch.full((64,), 7.0)
    kernels.dequantize(pack((3, 5), bits, nested=True), around[:15], bits=bits)
    assert torch.equal(around[15:], torch.full((49,), 7.0))


@pytest.mark.parametrize("codebook", ["nf3", "nf2"])
def test_the_check_before_first_use_finds_a_kernel_that_computes_something_else(codebook):
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        assert all(agrees(kernels, cpu, dtype, nested=nested, codebook=codebook) for nested in (True, False))

    def off_by_one_bit(packed, out, *, bits):
        kernels.dequantize(packed, out, bits=bits)
        out.view(-1)[-1:].view(torch.int32).add_(1)

    wrong = types.SimpleNamespace(dequantize=off_by_one_bit)
    assert not agrees(wrong, cpu, torch.float32, nested=True, codebook=codebook)
