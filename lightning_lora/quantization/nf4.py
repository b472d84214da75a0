"""A linear layer whose weight is stored in NF4: our own small module over bitsandbytes' kernels, on CPU and CUDA.

``bitsandbytes.nn.Linear4bit`` keeps its constants outside the module's tensors and, on CPUs with AVX512-BF16, repacks
its weight in place at the first evaluation, after which no gradient passes through it and dequantizing gives another
weight. Here packed codes and constants are ordinary buffers and nothing ever rewrites them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import dependencies
from lightning_lora.kernels import few_tokens
from lightning_lora.kernels.nf4 import dequantize_nf4
from lightning_lora.kernels.packed import DTYPES, NESTED_BLOCK, Packed
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.quantization.config import NF4Config

_CPU_PIECE = 2**18  # weights packed at once on the CPU; a multiple of every block size


class NF4Linear(QuantizedLinear):
    """``y = x deq(W)^T + b``: the weight is dequantized for each product and never kept.

    The 32-bit constants are held as ``int32`` bit patterns: a cast of the whole module (``.half()``,
    ``.to(torch.bfloat16)``, Lightning's ``*-true`` precisions) rounds every floating-point tensor, and rounded
    constants would be another base model.

    Attributes:
        codes: Packed 4-bit codes, two to a byte, the even element in the high half; ``uint8``.
        absmax: Maximum of each block: ``float32`` bits, or 8-bit codes when double-quantized.
        nested_absmax: ``float32`` bits of one maximum per 256 of those; empty unless double-quantized.
        offset: ``float32`` bits of the mean that double quantization takes off first; empty unless double-quantized.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    _like: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        config: NF4Config,
        *,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: nn.Parameter | None,
        source_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.config = config
        # Follows the casts of the module around it, as the weight would have: what a merged weight has to be stored in.
        self.register_buffer("_like", torch.empty(0, dtype=source_dtype), persistent=False)
        empty = torch.empty(0, dtype=torch.int32, device=codes.device)
        self.register_buffer("codes", codes.reshape(-1))
        self.register_buffer("absmax", absmax if config.double_quant else absmax.float().view(torch.int32))
        self.register_buffer(
            "nested_absmax", empty if nested_absmax is None else nested_absmax.float().view(torch.int32)
        )
        self.register_buffer("offset", empty if offset is None else offset.float().reshape(1).view(torch.int32))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, layer: nn.Linear, config: NF4Config, *, weight: Tensor | None = None) -> NF4Linear:
        """Quantize a layer's weight, or another one in its place; the layer stays as it is and its bias is shared."""
        functional = dependencies.bitsandbytes("NF4").functional
        weight = layer.weight.detach() if weight is None else weight
        codes, absmax = _pack(functional, weight.reshape(-1), config.block_size)
        nested_absmax = offset = None
        if config.double_quant:  # QLoRA, section 3: the maxima are positive, so their mean is taken off first
            offset = absmax.mean()
            absmax, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            nested_absmax = state.absmax
        return cls(
            (layer.out_features, layer.in_features),
            config,
            codes=codes,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            bias=layer.bias,
            source_dtype=layer.weight.dtype,
        ).train(layer.training)

    @classmethod
    def from_state(
        cls, codes: Tensor, state: Any, config: NF4Config, *, bias: nn.Parameter | None, source_dtype: torch.dtype
    ) -> NF4Linear:
        """Take over packed codes and a ``bitsandbytes.functional.QuantState`` as they are."""
        return cls(
            (state.shape[0], state.shape[1]),
            config,
            codes=codes,
            absmax=state.absmax,
            nested_absmax=state.state2.absmax if state.nested else None,
            offset=state.offset if state.nested else None,
            bias=bias,
            source_dtype=source_dtype,
        )

    def hold_as_parameters(self) -> None:
        """Hold codes and constants as frozen parameters instead of buffers, under the same names.

        FSDP2 shards parameters alone. Buffers are the default, because ``AdamW(self.parameters(), fused=True)`` refuses
        integers.
        """
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            tensor = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)`` in the input's dtype, or in autocast's where that is on."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        compute = self.config.compute_dtype or dtype
        bias = None if self.bias is None else self.bias.to(compute)
        with torch.autocast(x.device.type, enabled=False):  # it would override compute_dtype
            if few_tokens.are_few(x):
                return few_tokens.gemm_4bit(x.to(compute), self.packed, self._shape, bias).to(dtype)
            y: Tensor = _DequantizedLinear.apply(x.to(compute), bias, self)  # type: ignore[no-untyped-call]
        return y.to(dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of shape ``(O, I)`` that :meth:`forward` multiplies with when it computes in ``dtype``."""
        kernel_dtype = dtype if dtype in DTYPES else torch.float32
        return dequantize_nf4(self.packed, self._shape, kernel_dtype).to(dtype)

    @property
    def packed(self) -> Packed:
        """Codes and constants as the kernels take them."""
        return Packed(self.codes, self.absmax, self.nested_absmax, self.offset, self.config.block_size)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def storage(self) -> str:
        """``nf4``, with the block size and whether the maxima are quantized too."""
        return self.config.storage

    @property
    def merge_dtype(self) -> torch.dtype:
        """The dtype of the layer it was quantized from, or what the model was cast to since."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def extra_repr(self) -> str:
        """Sizes and storage, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.storage}"


class _DequantizedLinear(torch.autograd.Function):
    """``y = x deq(W)^T + b``, saving only a reference to the layer: backward dequantizes again (QLoRA, equation 5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_needed, bias_needed, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.dequantize(grad.dtype) if x_needed else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if bias_needed else None
        return grad_x, grad_bias, None


def _pack(functional: Any, flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return codes and block maxima of a flat weight.

    On the CPU bitsandbytes makes up to 14 bytes of temporaries for each weight it packs at once, so it gets pieces.
    """
    count = flat.numel()
    piece = _CPU_PIECE if flat.device.type == "cpu" else max(count, 1)
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, count, piece):
        part = flat[start : start + piece]
        floats = part if part.dtype in DTYPES else part.float()
        packed, state = functional.quantize_4bit(floats, blocksize=block_size, quant_type="nf4")
        codes[start // 2 : start // 2 + packed.numel()] = packed.reshape(-1)
        absmax[start // block_size : start // block_size + state.absmax.numel()] = state.absmax
    return codes, absmax
