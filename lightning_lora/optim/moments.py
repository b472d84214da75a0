"""The moments of AdamW for many parameters, one behind the other in one buffer each, updated by bitsandbytes.

Every parameter starts at a block of its own, so none shares a scale with another, and its numbers are those that
bitsandbytes gets when it updates that parameter alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora import dependencies
from lightning_lora.errors import OptimizerError

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizers."""

MIN_8BIT = 4096
"""Elements of a parameter from which on its moments are in 8 bits, as in bitsandbytes.

Smaller ones take no memory that would be missed, biases and norms among them are sensitive, and on a CPU an update in
32 bits is several times as fast.
"""

MIN_PAGED = 100_000
"""Elements of a buffer from which on it is paged, as in bitsandbytes; a smaller one is not worth a page."""


def library() -> ModuleType:
    """Import bitsandbytes, or say that it is missing."""
    return dependencies.bitsandbytes("optimizer='paged_adamw_8bit'")


def padded(elements: int) -> int:
    """Elements that a parameter takes in a buffer: up to the next block."""
    return -(-elements // BLOCK) * BLOCK


class Moments(ABC):
    """Both moments of several parameters.

    Attributes:
        elements: Length of the buffers, a multiple of ``BLOCK``.
        device: Where the parameters are.
        paged: Whether the GPU may evict the moments to the host.
        tensors: The buffers by the names bitsandbytes gives them.
    """

    per_element: ClassVar[Mapping[str, tuple[int, torch.dtype]]]
    """How many elements of a parameter one entry of each buffer stands for, and its dtype."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.elements = elements
        self.device = device
        self.paged = is_paged(elements, device)
        self.tensors = {name: self._blank(name) for name in self.per_element}

    @staticmethod
    def of(parameter: Tensor) -> type[Moments]:
        """Which moments a parameter has: in 8 bits, or in 32 if it is small."""
        return Moments8bit if parameter.numel() >= MIN_8BIT else Moments32bit

    @abstractmethod
    def update(
        self, weight: Tensor, gradient: Tensor, part: Mapping[str, Tensor], step: int, group: Mapping[str, Any]
    ) -> None:
        """Do one step of AdamW, in place.

        Args:
            weight: Parameters one behind the other, of shape ``(n,)``.
            gradient: Their gradient, of the same shape and dtype.
            part: Where their moments are, from :meth:`part`.
            step: Number of this step, from 1 on, for the correction of the bias.
            group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        """

    @abstractmethod
    def _zero(self, name: str) -> int:
        """The entry of a buffer that stands for zero."""

    def fill(self, start: int, shape: torch.Size, saved: Mapping[str, Tensor]) -> None:
        """Copy the saved moments of one parameter to their place.

        Raises:
            KeyError: If a tensor is missing.
            OptimizerError: If one is of another size or dtype.
        """
        for name, place in self.part(start, shape.numel()).items():
            _copy_checked(place, saved[name], name)

    def part(self, start: int, elements: int) -> dict[str, Tensor]:
        """Views of the buffers for ``elements`` elements from ``start`` on."""
        views = {}
        for name, (per, _) in self.per_element.items():
            view = self.tensors[name][start // per : start // per + -(-elements // per)]
            if self.paged and name.startswith("state"):  # where bitsandbytes looks; a view does not inherit it
                view.is_paged, view.page_deviceid = True, self.device.index  # type: ignore[attr-defined]
            views[name] = view
        return views

    def zero_(self) -> None:
        """Be as new."""
        for name, tensor in self.tensors.items():
            tensor.fill_(self._zero(name))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy or a pickle of a paged tensor is an ordinary one that still says it is paged.
        kept = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return _restored, (type(self), self.elements, self.device, kept)

    def _blank(self, name: str) -> Tensor:
        per, dtype = self.per_element[name]
        if self.paged and name.startswith("state"):
            functional = library().functional
            with torch.cuda.device(self.device):
                buffer: Tensor = functional.get_paged(self.elements, dtype=dtype, device=self.device)
                functional.fill(buffer, self._zero(name))
            return buffer
        return torch.full((self.elements // per,), self._zero(name), dtype=dtype, device=self.device)

    def _prefetch(self, part: Mapping[str, Tensor]) -> None:
        """Bring paged moments to the GPU before the kernel asks for them page by page."""
        if self.paged:
            with torch.cuda.device(self.device):
                for name in ("state1", "state2"):
                    library().functional.prefetch_tensor(part[name])


class Moments8bit(Moments):
    """Moments as 8-bit codes, with a scale for each block."""

    per_element: ClassVar[Mapping[str, tuple[int, torch.dtype]]] = {
        "state1": (1, torch.uint8),
        "state2": (1, torch.uint8),
        "absmax1": (BLOCK, torch.float32),
        "absmax2": (BLOCK, torch.float32),
    }

    def update(
        self, weight: Tensor, gradient: Tensor, part: Mapping[str, Tensor], step: int, group: Mapping[str, Any]
    ) -> None:
        """Do one step: dequantize, update and quantize again, in one kernel on CUDA."""
        self._prefetch(part)
        (beta1, beta2), (signed, unsigned) = group["betas"], levels(self.device)
        library().functional.optimizer_update_8bit_blockwise(
            "adam", gradient, weight, part["state1"], part["state2"], float(beta1), float(beta2), 0.0, 0.0,
            float(group["eps"]), step, float(group["lr"]), signed, unsigned, part["absmax1"], part["absmax2"],
            float(group["weight_decay"]),
        )  # fmt: skip

    def _zero(self, name: str) -> int:
        # A code of 0 stands for the least value. Up to the end of a block, past the last element, it would count in the
        # scale once there is one.
        tables = dict(zip(("state1", "state2"), levels(self.device), strict=True))
        return int(tables[name].abs().argmin()) if name in tables else 0


class Moments32bit(Moments):
    """Moments in ``float32``."""

    per_element: ClassVar[Mapping[str, tuple[int, torch.dtype]]] = {
        "state1": (1, torch.float32),
        "state2": (1, torch.float32),
    }

    def update(
        self, weight: Tensor, gradient: Tensor, part: Mapping[str, Tensor], step: int, group: Mapping[str, Any]
    ) -> None:
        """Do one step in one kernel."""
        self._prefetch(part)
        beta1, beta2 = group["betas"]
        library().functional.optimizer_update_32bit(
            "adam", gradient, weight, part["state1"], float(beta1), float(group["eps"]), step, float(group["lr"]),
            part["state2"], float(beta2), weight_decay=float(group["weight_decay"]),
        )  # fmt: skip

    def _zero(self, name: str) -> int:
        return 0


def is_paged(elements: int, device: torch.device) -> bool:
    """Whether a buffer of moments is paged: where there is CUDA's managed memory, and no smaller than a page."""
    return device.type == "cuda" and elements >= MIN_PAGED


def _copy_checked(place: Tensor, saved: Tensor, name: str) -> None:
    """Copy a saved tensor to its place.

    Raises:
        OptimizerError: If it is of another size or kind.
    """
    if saved.numel() != place.numel() or saved.dtype != place.dtype:
        raise OptimizerError(
            f"{name} was saved as {saved.numel()} elements of {saved.dtype}, and has {place.numel()} of {place.dtype} "
            "here"
        )
    place.copy_(saved.flatten())


@cache
def levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values that codes stand for: of the first moment, and of the second, which is never negative."""
    make = library().functional.create_dynamic_map
    return make(signed=True).to(device), make(signed=False).to(device)


def _restored(kind: type[Moments], elements: int, device: torch.device, tensors: Mapping[str, Tensor]) -> Moments:
    moments = kind(elements, device)
    for name, tensor in tensors.items():
        moments.tensors[name].copy_(tensor)
    return moments
