"""NF4 storage: bit-equal to bitsandbytes, unmoved by casts and by evaluation."""

import copy
import io

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from lightning_lora import NF4Config
from lightning_lora.quantization.nf4 import NF4Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# QLoRA, appendix E: the sixteen levels
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def linear(out: int = 96, inner: int = 128, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(inner, out, bias=bias, dtype=dtype).requires_grad_(False)


def stored_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("shape", [(96, 128), (33, 70), (1, 2), (513, 1026)])
def test_codes_constants_and_weights_equal_bitsandbytes_bit_for_bit(dtype, double_quant, block_size, shape):
    dense = linear(*shape, dtype=dtype)
    codes, state = bnb.quantize_4bit(
        dense.weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    ours = NF4Linear.from_linear(dense, NF4Config(block_size=block_size, double_quant=double_quant))
    assert torch.equal(ours.codes, codes.reshape(-1))
    if double_quant:
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested_absmax.view(torch.float32), state.state2.absmax)
        assert torch.equal(ours.offset.view(torch.float32)[0], state.offset)
    else:
        assert torch.equal(ours.absmax.view(torch.float32), state.absmax)
    # reshaped, because bitsandbytes returns a weight of a single byte transposed
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state).reshape(shape))


def test_the_levels_are_the_papers():
    """A block whose maximum is 1 dequantizes to the levels themselves; each level quantizes to itself."""
    dense = linear(1, 64, bias=False)
    dense.weight.copy_(torch.tensor(LEVELS * 4)[None])
    ours = NF4Linear.from_linear(dense, NF4Config(double_quant=False))
    assert torch.equal(ours.dequantize(torch.float32), dense.weight)
    assert ours.codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.13), (False, 4.50)])
def test_a_4096_square_layer_takes_the_published_bits_per_parameter(double_quant, bits):
    ours = NF4Linear.from_linear(linear(4096, 4096, torch.bfloat16, bias=False), NF4Config(double_quant=double_quant))
    assert 8 * stored_bytes(ours) / 4096**2 <= bits


def test_error_on_gaussian_weights_is_the_published_one():
    dense = linear(1024, 1024, bias=False)
    nn.init.normal_(dense.weight)
    found = NF4Linear.from_linear(dense, NF4Config()).dequantize(torch.float32)
    relative = ((found - dense.weight).norm() / dense.weight.norm()).item()
    assert relative == pytest.approx(0.0920, abs=0.0005)  # a million draws: the third digit is stable


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_equal_the_dense_layer_with_the_dequantized_weight(dtype, bias):
    dense = linear(dtype=dtype, bias=bias)
    ours = NF4Linear.from_linear(dense, NF4Config())
    weight = ours.dequantize(dtype)
    x = torch.randn(5, 3, 128, dtype=dtype, requires_grad=True)
    expected = nn.functional.linear(x, weight, dense.bias)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    found = ours(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, x, grad)[0], expected_grad)


def test_gradients_are_the_same_bit_for_bit_before_and_after_a_validation_pass():
    """bitsandbytes' own layer repacks its weight at the first evaluation on CPUs with AVX512-BF16."""
    layer = NF4Linear.from_linear(linear(128, 128), NF4Config())
    model = nn.Sequential(nn.Linear(128, 128), layer, nn.ReLU(), nn.Linear(128, 1))

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(torch.ones(2, 128)).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before, weight = gradients(), layer.dequantize(torch.float32)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for dtype in (torch.float32, torch.bfloat16):
                copy.deepcopy(model).to(dtype).eval()(torch.ones(1, 128, dtype=dtype))
                model.eval()(torch.ones(1, 128))
    after = gradients()
    assert len(before) == 4  # weights and biases of the two dense layers
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(layer.dequantize(torch.float32), weight)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16().double()])
@pytest.mark.parametrize("double_quant", [True, False])
def test_casting_the_module_rounds_no_constant(cast, double_quant):
    ours = NF4Linear.from_linear(linear(), NF4Config(double_quant=double_quant))
    before = ours.dequantize(torch.float32)
    codes = ours.codes.clone()
    cast(ours)
    assert torch.equal(ours.dequantize(torch.float32), before)
    assert torch.equal(ours.codes, codes)


def test_storage_survives_state_dict_pickle_and_deepcopy_bit_for_bit():
    ours, other = (NF4Linear.from_linear(linear(), NF4Config()) for _ in range(2))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (other, copy.deepcopy(ours)):
        assert torch.equal(twin.dequantize(torch.float32), ours.dequantize(torch.float32))


def test_compute_dtype_and_autocast_decide_the_product_but_not_the_output():
    ours = NF4Linear.from_linear(linear(), NF4Config(compute_dtype=torch.bfloat16))
    x = torch.randn(3, 128)
    y = ours(x)
    assert y.dtype == torch.float32
    expected = nn.functional.linear(x.bfloat16(), ours.dequantize(torch.bfloat16), ours.bias.bfloat16())
    assert torch.equal(y, expected.float())
    free = NF4Linear.from_linear(linear(), NF4Config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert free(x).dtype == torch.bfloat16


def test_double_precision_inputs_compute_in_double_precision():
    ours = NF4Linear.from_linear(linear(), NF4Config()).double()
    x = torch.randn(3, 128, dtype=torch.float64)
    assert torch.equal(ours(x), nn.functional.linear(x, ours.dequantize(torch.float32).double(), ours.bias))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_size": 48}, "block_size must be one of 32, 64"),
        ({"double_quant": 1}, "double_quant must be True or False"),
        ({"compute_dtype": torch.float64}, "compute_dtype must be None or one of"),
    ],
)
def test_values_that_are_none_of_the_choices_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        NF4Config(**settings)


def test_autocast_does_not_override_the_compute_dtype():
    layer = NF4Linear.from_linear(nn.Linear(256, 64), NF4Config(compute_dtype=torch.float32))
    x = torch.randn(8, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        computed = layer(x)
    assert torch.equal(computed, layer(x).bfloat16())
