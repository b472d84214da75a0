"""Taking over layers that bitsandbytes has quantized already, without quantizing them again."""

from __future__ import annotations

from typing import Any

import torch

from lightning_lora.errors import QuantizationError
from lightning_lora.kernels.packed import NESTED_BLOCK
from lightning_lora.nn.base import register_adopter
from lightning_lora.quantization.config import FP4Config, NF4Config
from lightning_lora.quantization.four_bits import FourBitLinear
from lightning_lora.quantization.fp4 import FP4Linear
from lightning_lora.quantization.int8 import Int8Linear
from lightning_lora.quantization.nf4 import NF4Linear

_FOUR_BITS = {"nf4": (NF4Config, NF4Linear), "fp4": (FP4Config, FP4Linear)}


def adopt_linear4bit(layer: Any) -> FourBitLinear:
    """Turn a quantized ``Linear4bit`` into a layer of ours with the same codes and constants, bit for bit.

    Raises:
        QuantizationError: If the layer stores something else than NF4 or FP4, is not quantized yet, or was
            repacked by an evaluation on CPU, which cannot be undone exactly.
    """
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    if state is None:
        raise QuantizationError(
            "this Linear4bit is not quantized yet (that happens when it moves to its device). Move the model first, "
            "or build it with nn.Linear and let quantization='nf4' do it"
        )
    if state.quant_type not in _FOUR_BITS:
        raise QuantizationError(f"this Linear4bit stores {state.quant_type}; nf4 and fp4 can be taken over")
    if getattr(state, "packing_format_for_cpu", False):
        raise QuantizationError(
            "this Linear4bit was evaluated on the CPU, where bitsandbytes repacks the weight so that it cannot be "
            "trained or read back exactly. Inject before the first evaluation, or set "
            "layer.support_avx512bf16_for_cpu = False on every Linear4bit"
        )
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        raise QuantizationError(
            f"this Linear4bit nests its constants in blocks of {state.state2.blocksize}, expected {NESTED_BLOCK}"
        )
    config_class, linear_class = _FOUR_BITS[state.quant_type]
    config = config_class(block_size=state.blocksize, double_quant=state.nested, compute_dtype=layer.compute_dtype)
    codes = weight.data.reshape(-1).view(torch.uint8)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    taken = linear_class.from_state(codes, state, config, bias=layer.bias, source_dtype=state.dtype)
    return taken.train(layer.training)


def adopt_linear8bit(layer: Any) -> Int8Linear:
    """Turn a quantized ``Linear8bitLt`` into an :class:`Int8Linear` with the same codes and maxima, bit for bit.

    Raises:
        QuantizationError: If the layer is not quantized (yet).
    """
    if layer.weight.dtype != torch.int8:
        raise QuantizationError(
            "this Linear8bitLt is not quantized: its weights are 16-bit (has_fp16_weights=True), or it has not been "
            "moved to its device yet. Move the model first, or build it with nn.Linear and pass quantization='int8'"
        )
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    return Int8Linear.from_linear8bit(layer)


register_adopter("bitsandbytes.nn.modules.Linear4bit", adopt_linear4bit)
register_adopter("bitsandbytes.nn.modules.Linear8bitLt", adopt_linear8bit)
