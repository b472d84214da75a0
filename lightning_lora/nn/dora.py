"""DoRA: ``DoRAConfig`` says what to build, ``DoRA`` is the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.base import QuantizedLinear, dense_weight, is_called_as_it_is, layer_bias, weight_dtype
from lightning_lora.nn.functional import row_norms, updated
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.low_rank import LowRankConfig, draw_factors
from lightning_lora.nn.once_per_step import OncePerStep


@dataclass(frozen=True, kw_only=True, slots=True)
class DoRAConfig(LowRankConfig):
    """Weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353): ``h = m/||V|| V x + b``, ``V = W + s B A``.

    Each row of the weight is a direction, changed by low rank, and a length ``m``, trained as it is. ``||V||`` counts
    as a constant in the gradient (section 4.3). Dropout acts on the input of ``A`` alone, as in LoRA:
    ``m/||V|| (W x + s B A D(x)) + b``. PEFT also drops out part of the base's input, and pays a second product for it;
    in evaluation both compute the same.

    Takes the arguments of :class:`~lightning_lora.nn.lora.LoRAConfig`.
    """

    method: ClassVar[str] = "dora"

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> DoRA:
        """Make a fresh :class:`DoRA` for ``base_layer``."""
        return DoRA(self, kind_of(base_layer), base_layer, device=device, dtype=dtype)


class DoRA(Adapter):
    """One DoRA on one layer: ``y' = m/||V|| (y - b + s B A phi(D(x))) + b`` with ``V = W + s B A``.

    A row of ``V`` that is zero has no direction; it is left as it is, and can be learnt.

    Attributes:
        lora_A: Down projection of shape ``(R, I)``, random at the start (over an embedding zero).
        lora_B: Up projection of shape ``(O, R)``, zero at the start (over an embedding random).
        lora_magnitude_vector: ``m`` of shape ``(O,)``, at the start the lengths of the rows of ``W``.
    """

    additive = False
    up = ("lora_B",)

    config: DoRAConfig

    def __init__(
        self, config: DoRAConfig, kind: Kind, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.lora_A = nn.Parameter(torch.empty(config.r, kind.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(kind.out_features, config.r, device=device, dtype=dtype))
        self.lora_magnitude_vector = nn.Parameter(torch.empty(kind.out_features, device=device, dtype=dtype))
        self._norms = OncePerStep()
        self.reset_parameters()
        self.measure(base_layer)

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Map input and base output to the adapted output."""
        if self._dropout > 0:
            x = self.kind.drop(x, self._dropout)
        return self._lengthened(self.kind.add_low_rank(y, x, self.lora_A, self.lora_B, self.config.scale), base_layer)

    def over(self, x: Tensor, base_layer: nn.Module) -> Tensor:
        """Map the input to the adapted output."""
        if not is_called_as_it_is(self):
            return super().over(x, base_layer)
        z = self.kind.over(base_layer, x, self.lora_A, self.lora_B, self.config.scale, self._dropout)
        return self._lengthened(z, base_layer)

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def _lengthened(self, z: Tensor, base_layer: nn.Module) -> Tensor:
        """Give the output of ``V`` the lengths ``m`` in the place of ``||V||``; the bias stays as it is."""
        factor, bias = self._factor(self.norms(base_layer)), layer_bias(base_layer)
        # The factor is not rounded to half precision, where there is nothing between 1 and 1.0078; z is saved in it.
        scaled = self.kind.along_outputs(factor, z) * z
        if bias is not None:
            scaled = scaled + self.kind.along_outputs((1 - factor) * bias, z)
        return scaled.to(z.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``m/||V|| V`` in ``weight``'s dtype; ``weight`` has to be the base's own."""
        V = updated(self.kind.to_matrix(weight), self.lora_A, self.lora_B, self.config.scale)
        norms = torch.linalg.vector_norm(V.detach(), dim=1).to(self.lora_magnitude_vector.dtype)
        return self.kind.from_matrix(V * self._factor(norms).to(V.dtype).unsqueeze(1))

    def norms(self, base_layer: nn.Module) -> Tensor:
        """Return ``||V||`` of each row, of shape ``(O,)`` and in ``m``'s dtype, without gradient.

        They are computed at most once in an optimizer step, however often the layer is called in it; in a compiled
        graph, which can keep nothing, at each call.
        """
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self._measured(base_layer)
        below = (*base_layer.parameters(recurse=False), *base_layer.buffers(recurse=False))
        sources = (self.lora_A, self.lora_B, *below)
        return self._norms.get(sources, self.training, lambda: self._measured(base_layer))

    def reset_parameters(self) -> None:
        """Draw one factor and zero the other. The magnitudes are unknown until :meth:`measure` has seen the layer."""
        draw_factors(self.config, self.kind, self.lora_A, self.lora_B)
        nn.init.constant_(self.lora_magnitude_vector, torch.nan)  # any number would pass for a length

    @torch.no_grad()
    def measure(self, base_layer: nn.Module) -> None:
        """Set the magnitudes to the lengths of the rows of ``V``: the layer then computes what plain LoRA would."""
        self.lora_magnitude_vector.copy_(self._measured(base_layer))

    @torch.no_grad()
    def rebase(self, before: nn.Module, after: nn.Module) -> None:
        """Keep ``m/||V||``: rows of a quantized weight have other lengths, and a fresh DoRA must change nothing.

        Magnitudes that are lengths of rows of a weight stored as ``after`` is stay what they are.
        """
        if isinstance(after, QuantizedLinear) and self.trained_over == after.storage:
            self.trained_over = None
            self._norms.forget()
            return
        factor = self._factor(self._measured(before))
        self._norms.forget()
        self.lora_magnitude_vector.copy_(factor * self._measured(after))

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return str(self.config)

    def _measured(self, base_layer: nn.Module) -> Tensor:
        quantized = isinstance(base_layer, QuantizedLinear)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32) if quantized else weight_dtype(base_layer)
        weight = dense_weight(base_layer, dtype)
        norms = row_norms(self.kind.to_matrix(weight), self.lora_A, self.lora_B, self.config.scale)
        return norms.to(self.lora_magnitude_vector.dtype)  # rounded alike, so that m/||V|| starts at exactly 1

    def _factor(self, norms: Tensor) -> Tensor:
        """``m/||V||`` in ``float32`` at least, and 1 where a row is zero."""
        dtype = torch.promote_types(norms.dtype, torch.float32)
        has_direction = norms > 0
        factor = self.lora_magnitude_vector.to(dtype) / torch.where(has_direction, norms, 1).to(dtype)
        return torch.where(has_direction, factor, 1)
