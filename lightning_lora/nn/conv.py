"""Convolutions in one, two and three dimensions, with stride, dilation, groups and every padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.nn.kind import Kind

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class ConvKind(Kind):
    """``y = W * x + b`` with a kernel ``W: (O, C/groups, k...)``, which as a matrix is ``(O, C/groups k...)``.

    The update ``B A`` is a convolution with the ``R`` kernels of ``A`` (with the base's stride, padding and dilation),
    then one of size 1 with ``B``. With groups, the kernels of ``A`` are applied to the channels of each group, and the
    rows of ``B`` that belong to a group see the result of that group: merged and unmerged agree.

    Attributes:
        kernel: ``(C/groups, k...)``.
        stride: Per spatial axis.
        padding: Per spatial axis, or ``"same"`` or ``"valid"``.
        dilation: Per spatial axis.
        groups: Number of groups.
        pad: What to pad beforehand, in ``F.pad``'s order; empty where the convolution pads with zeros itself.
        pad_mode: How.
    """

    name: ClassVar[str] = "conv"

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"

    @classmethod
    def of(cls, layer: Any) -> ConvKind:
        """Read a ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``."""
        kernel = (layer.in_channels // layer.groups, *layer.kernel_size)
        zeros = layer.padding_mode == "zeros"
        return cls(
            in_features=math.prod(kernel),
            out_features=layer.out_channels,
            kernel=kernel,
            stride=tuple(layer.stride),
            padding=(layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)) if zeros else "valid",
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            pad=() if zeros else tuple(layer._reversed_padding_repeated_twice),
            pad_mode="constant" if zeros else layer.padding_mode,
        )

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel) - 1

    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return ``y + s B (A * x)``."""
        convolve, ones = _CONVOLUTIONS[self.axes], (1,) * self.axes
        down = self._down(x.to(y.dtype), lora_A.to(y.dtype))
        up = convolve(down, lora_B.to(y.dtype).view(*lora_B.shape, *ones), None, groups=self.groups)
        return y + scaling * up

    def features(self, x: Tensor) -> Tensor:
        """Return the patches a kernel is applied to, of all positions and groups: those of ``A = 1``."""
        patches = self._down(x, torch.eye(self.in_features, dtype=x.dtype, device=x.device))
        last = patches.movedim(-1 - self.axes, -1)  # of each position, the patches of all groups
        return last.reshape(-1, self.in_features)

    def _down(self, x: Tensor, lora_A: Tensor) -> Tensor:
        """Apply ``R`` kernels to each group: ``(N, G R, ...)``."""
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        kernels = lora_A.view(-1, *self.kernel)
        if self.groups > 1:
            kernels = kernels.repeat(self.groups, *(1,) * len(self.kernel))
        return _CONVOLUTIONS[self.axes](x, kernels, None, self.stride, self.padding, self.dilation, self.groups)

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """Channels stand before the spatial axes."""
        return vector.view(-1, *(1,) * self.axes)

    def has_batch(self, x: Tensor) -> bool:
        """A single image has its channels first."""
        return x.dim() == self.axes + 2

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return ``(O, C/groups k...)``."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return ``(O, C/groups, k...)``."""
        return matrix.view(-1, *self.kernel)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers of this kind."""
