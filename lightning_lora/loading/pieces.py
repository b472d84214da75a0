"""What is read from the files and put in its place as one: a tensor, or a module with some of its weights packed.

``read`` runs in the thread that reads ahead, on the CPU; ``stage`` runs where the model is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lora.errors import LoadError, listing
from lightning_lora.loading.reader import Reader
from lightning_lora.loading.staged import Staged, put_tensor
from lightning_lora.model.split import taken_apart
from lightning_lora.nn.base import stored_weight
from lightning_lora.nn.copied import copied
from lightning_lora.nn.fingerprint import Fingerprint, fingerprint
from lightning_lora.nn.split import Split
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.formats import linear_class
from lightning_lora.quantization.pack import pack, require_finite


@dataclass(frozen=True)
class Target:
    """Where tensors go.

    Attributes:
        device: To which device.
        dtype: What floating-point tensors that stay dense are cast to, and packed layers would be; None keeps them.
    """

    device: torch.device
    dtype: torch.dtype | None

    def moved(self, tensor: Tensor) -> Tensor:
        """Bring a tensor there. From pinned memory the copy runs while the next tensor is read."""
        wanted = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, non_blocking=True).to(wanted)


class Loaded(ABC):
    """A piece that has been read."""

    @abstractmethod
    def stage(self, target: Target, staged: Staged) -> None:
        """Bring it to its device, pack what is to be packed, and keep the outcome aside.

        Raises:
            LoadError: If it contradicts itself.
            QuantizationError: If a weight that is to be packed is not finite.
        """


@dataclass(frozen=True)
class Piece(ABC):
    """A part of a model that is loaded at once.

    Attributes:
        size: Bytes in the files.
    """

    size: int

    @abstractmethod
    def read(self, reader: Reader) -> Loaded:
        """Read it into memory."""


@dataclass(frozen=True)
class DensePiece(Piece):
    """One tensor of the model, as it is in the files.

    Attributes:
        names: In the model, all of one tensor.
        sources: In the files: one name, or several that the model ties.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]

    def read(self, reader: Reader) -> Loaded:
        """Read it."""
        return _LoadedTensor(self.names, _read(reader, self.sources))


@dataclass
class _LoadedTensor(Loaded):
    names: tuple[str, ...]
    tensor: Tensor

    def stage(self, target: Target, staged: Staged) -> None:
        staged.tensor(self.names, target.moved(self.tensor))


@dataclass(frozen=True)
class PackedPiece(Piece):
    """A linear layer to be packed, or a module around several: an attention, a stack of experts.

    Attributes:
        path: Name of the module, for errors.
        module: What stands in the model now; it stays as it is.
        sources: Names in the files, of each tensor one or several, by names in the module.
        known: Buffers that are not in the files, likewise.
        parts: Which layers to pack: names in the module taken apart, or ``""`` for the module itself.
        config: How.
        whole: Whether fingerprints are of all bytes, see :mod:`lightning_lora.nn.fingerprint`.
        left: Where to note the layers that cannot be packed for their values, with the reason.
    """

    path: str
    module: nn.Module
    sources: Mapping[str, tuple[str, ...]]
    known: Mapping[str, Tensor]
    parts: tuple[str, ...]
    config: QuantizationConfig
    whole: bool
    left: dict[str, str] = field(compare=False)

    def read(self, reader: Reader) -> Loaded:
        """Read the module's tensors, and take the fingerprints of the weights."""
        module = copied(self.module)
        for name, sources in self.sources.items():
            put_tensor(module, (name,), _read(reader, sources))
        for name, buffer in self.known.items():
            put_tensor(module, (name,), buffer)
        if self.parts != ("",):
            module = taken_apart(module)
            module.own_memory()
        origins = {part: fingerprint(stored_weight(_part(module, part)), whole=self.whole) for part in self.parts}
        return _LoadedModule(self, module, origins)


@dataclass
class _LoadedModule(Loaded):
    piece: PackedPiece
    module: nn.Module
    origins: Mapping[str, Fingerprint]

    def stage(self, target: Target, staged: Staged) -> None:
        module = self.module
        for part, origin in self.origins.items():
            layer = self._packed(part, _part(module, part).to(target.device, non_blocking=True), origin, target.dtype)
            if isinstance(module, Split):
                module.add_module(part, layer)
            else:
                module = layer
        self.module = module  # lets go of the dense one
        for name, parameter in list(module.named_parameters()):
            put_tensor(module, (name,), target.moved(parameter.detach()))
        staged.module(self.piece.module, module.to(target.device))

    def _packed(self, part: str, base: nn.Module, origin: Fingerprint, dtype: torch.dtype | None) -> nn.Module:
        piece = self.piece
        name = ".".join(filter(None, (piece.path, part)))
        require_finite(name, base)
        weight = stored_weight(base).detach()
        reason = linear_class(piece.config).refusal(weight, weight.device)
        if reason is not None:
            piece.left[name] = reason
            return base
        packed = pack(base, piece.config)
        packed.remember(origin)
        return packed.to(dtype=dtype).requires_grad_(False)


def _part(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)


def _read(reader: Reader, sources: tuple[str, ...]) -> Tensor:
    """Read a tensor that stands in the files under one name, or the same under several."""
    first, *others = map(reader, sources)
    unequal = [name for name, other in zip(sources[1:], others, strict=True) if not torch.equal(first, other)]
    if unequal:
        raise LoadError(
            f"the model ties what the files call {listing(sources)}, and {listing(unequal)} has other values than "
            f"{sources[0]} there. Build a model that does not tie them, or leave one out: "
            f"rename={{{unequal[0]!r}: None}}"
        )
    return first
