"""What every quantized linear layer of ours does alike: it holds packed tensors and multiplies with what they mean.

Packed tensors are ordinary buffers that no cast changes, and the weight is dequantized for each product.
How it is packed is the business of one small file for each format.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.linear import LinearKind
from lightning_lora.quantization.config import QuantizationConfig

Config = TypeVar("Config", bound=QuantizationConfig)


class FrozenLinear(QuantizedLinear, Generic[Config]):
    """``y = x deq(W)^T + b``: the weight is dequantized for each product, and kept only where there is :attr:`room`.

    Constants in ``float32`` are held as ``int32`` bit patterns: a cast of the whole module (``.half()``,
    ``.to(torch.bfloat16)``, Lightning's ``*-true`` precisions) rounds every floating-point tensor, and rounded
    constants would be another base model.

    Attributes:
        tensors: Names of the packed tensors, the codes first.
        config: How the weight is stored.
    """

    tensors: ClassVar[tuple[str, ...]]

    config: Config
    _like: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        config: Config,
        packed: Mapping[str, Tensor],
        *,
        bias: nn.Parameter | None,
        source_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.config = config
        # Follows the casts of the module around it, as the weight would have: what a merged weight has to be stored in.
        self.register_buffer("_like", torch.empty(0, dtype=source_dtype), persistent=False)
        for name in self.tensors:
            self.register_buffer(name, packed[name])
        self.register_parameter("bias", bias)

    @classmethod
    @abstractmethod
    def from_linear(cls, layer: nn.Linear, config: Config, *, weight: Tensor | None = None) -> Self:
        """Quantize a layer's weight, or another one in its place; the layer stays as it is and its bias is shared."""

    @classmethod
    def refusal(cls, weight: Tensor, device: torch.device) -> str | None:
        """Why this format cannot hold a weight of that shape on that device, or None if it can; no value is read."""
        return None if device.type in ("cpu", "cuda") else f"no kernel for it on {device.type}"

    @classmethod
    def refusal_of_values(cls, weight: Tensor) -> str | None:
        """Why this format cannot hold these values, or None if it can."""
        return None

    def take_after(self, layer: nn.Module) -> None:
        """Be, beyond the sizes, what the layer is whose weight this holds."""

    def hold_as_parameters(self) -> None:
        """Hold the packed tensors as frozen parameters instead of buffers, under the same names.

        FSDP2 shards parameters alone. Buffers are the default, because ``AdamW(self.parameters(), fused=True)`` refuses
        integers.
        """
        for name in self.tensors:
            if name in self._parameters:
                continue
            tensor = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)`` in the input's dtype, or in autocast's where that is on."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        compute = self.computes_in(dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        with torch.autocast(x.device.type, enabled=False):  # it would override compute_dtype
            y: Tensor = _DequantizedLinear.apply(x.to(compute), bias, self)  # type: ignore[no-untyped-call]
        return y.to(dtype)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """What the config says, or ``dtype`` where it says nothing."""
        return self.config.compute_dtype or dtype

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in :attr:`merge_dtype`, made anew on each access, for code that reads it.

        Under an adapter it is the adapted layer that is read.
        """
        return self.dequantize(self.merge_dtype)

    @property
    def kind(self) -> Kind:
        """That of a linear layer."""
        return LinearKind(self.in_features, self.out_features)

    @property
    def storage(self) -> str:
        """The config's words."""
        return self.config.storage

    @property
    def merge_dtype(self) -> torch.dtype:
        """The dtype of the layer it was quantized from, or what the model was cast to since."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        codes: Tensor = getattr(self, self.tensors[0])
        return codes.device

    def extra_repr(self) -> str:
        """Sizes and storage, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.storage}"


class _DequantizedLinear(torch.autograd.Function):
    """``y = x deq(W)^T + b``, saving only a reference to the layer: backward dequantizes again (QLoRA, equation 5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.matrix(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_needed, bias_needed, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.layer.matrix(grad.dtype) if x_needed else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if bias_needed else None
        return grad_x, grad_bias, None
