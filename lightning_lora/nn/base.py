"""What stands under an adapter: a layer of torch's, or a frozen linear layer that stores its weight in few bits.

The contract of the second is declared here and implemented elsewhere, so that adapters, merging and counting never need
to know how a weight is stored.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_lora.nn.fingerprint import Fingerprint, is_held, sample, sha256
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.pieces import pieces_of, rows_at_once
from lightning_lora.nn.room import Room

Updated = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]


@dataclass(frozen=True)
class Origin:
    """What a quantized weight was made from.

    Attributes:
        weight: Fingerprint of the dense weight.
        packed: Sample of the packed weight: other codes loaded in their place are of another origin.
    """

    weight: Fingerprint
    packed: str


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer ``y = x W^T + b`` whose ``W`` of shape ``(O, I)`` is stored in few bits.

    Attributes:
        in_features: ``I``.
        out_features: ``O``.
        bias: Parameter of shape ``(O,)`` or None.
        origin: What the weight was made from, or None where that was never seen. Copies and pickles take it along.
        edge: Whether it is an embedding or output head that was quantized for its own sake: it may stand without an
            adapter, and a merge makes it dense again like those that have one.
        room: Where the dequantized weight may be kept from one product to the next, or None.
        kept: The dequantized weight that is kept now, in what the layer computes in, or None.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    origin: Origin | None = None
    edge: bool = False
    room: Room | None = None
    kept: Tensor | None = None  # no buffer: averages of a model and its copies go through all buffers in pairs

    @property
    @abstractmethod
    def storage(self) -> str:
        """How the weight is stored, in a word or two, for people: ``nf4 double-quantized``."""

    @property
    @abstractmethod
    def merge_dtype(self) -> torch.dtype:
        """The dtype the weight would have in this model if it were not quantized."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the packed weight is."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How the weight is applied."""

    def dense(self) -> nn.Module:
        """Return a layer for a weight that is not quantized, on the meta device and without bias."""
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """What :meth:`forward` multiplies in to give an output of ``dtype``."""
        return dtype

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return ``W`` of shape ``(O, I)`` in ``dtype``: exactly the weight that :meth:`forward` multiplies with."""

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows of :meth:`dequantize` in order, a few at a time, without the whole of it where that can be."""
        yield from pieces_of(self.dequantize(dtype), dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return what :meth:`dequantize` does, not to be written to: the same tensor each time where there is room.

        What is kept is one dtype, that of the last call.
        """
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        weight = self.dequantize(dtype)
        # A graph could not fill it, and what inference mode makes cannot be trained with.
        if self.room is not None and not torch.compiler.is_compiling() and not weight.is_inference():
            self._keep(weight, self.room)
        return weight

    def updated(self) -> Updated | None:
        """What gives ``W + s B A``, of ``A``, ``B``, ``s`` and a dtype; None where updates are not to be fused."""
        return None

    def keep_in(self, room: Room | None) -> None:
        """Keep the dequantized weight from the next product on, as long as there is room; None keeps it no more."""
        self._forget()
        self.room = room

    def _keep(self, weight: Tensor, room: Room) -> None:
        self._forget()
        if room.take(weight.nbytes):
            self.kept = weight

    def _forget(self) -> None:
        if self.kept is not None and self.room is not None:
            self.room.give_back(self.kept.nbytes)
        self.kept = None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the module; what was kept is dequantized again where and in what it then computes."""
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load codes, which are another weight."""
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def remember(self, weight: Fingerprint) -> None:
        """Keep the fingerprint of the dense weight that this layer was made from."""
        self.origin = Origin(weight, sample(*self._packed()))

    def fingerprint(self, *, whole: bool = True) -> Fingerprint | None:
        """Return the fingerprint of the dense weight; of the packed one, and so marked, where that is all there is.

        None where neither is known, because other processes hold parts of it.
        """
        packed = self._packed()
        held = all(map(is_held, packed))
        if self.origin is not None and (not held or self.origin.packed == sample(*packed)):
            return self.origin.weight
        return self.packed_fingerprint(whole=whole) if held else None

    def packed_fingerprint(self, *, whole: bool = True) -> Fingerprint:
        """Return the fingerprint of codes and constants as they are stored."""
        packed = self._packed()
        digest = sha256(*packed) if whole else None
        return Fingerprint((self.out_features, self.in_features), "uint8", sample(*packed), digest, self.storage)

    def _packed(self) -> list[Tensor]:
        return [tensor for name, tensor in sorted(self.state_dict().items()) if name != "bias"]


_HOOKS = tuple(key for key in vars(nn.Module()) if "hook" in key and "state_dict" not in key)
"""Where ``nn.Module`` keeps what runs around ``forward`` and ``backward``."""

Adopter = Callable[[nn.Module], QuantizedLinear]
_adopters: dict[str, Adopter] = {}


def register_adopter(class_path: str, adopter: Adopter) -> None:
    """Register what turns layers of a foreign class, given by path and not imported, into base layers."""
    _adopters[class_path] = adopter


def adopter_of(layer: nn.Module) -> Adopter | None:
    """Return what turns a foreign quantized layer into a base layer, if ``layer`` is one."""
    return next((_adopters[path] for path in class_paths(layer) if path in _adopters), None)


def class_paths(layer: nn.Module) -> list[str]:
    """Where the class of a layer and those it derives from are defined: they can be told without importing them."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(layer).__mro__]


def stored_weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer that is not quantized, as the layer stores it."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight in ``dtype``, laid out as the layer has it; the live tensor where it has that dtype already."""
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype)
    return stored_weight(layer).detach().to(dtype)


def weight_pieces(layer: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of :func:`dense_weight` in order, a few at a time, to be written to."""
    if isinstance(layer, QuantizedLinear):
        return layer.pieces(dtype)
    weight = stored_weight(layer).detach()
    rows = torch.split(weight, rows_at_once(weight.shape))
    return (piece.to(dtype, copy=True, memory_format=torch.contiguous_format) for piece in rows)


def weight_shape(layer: nn.Module) -> torch.Size:
    """The shape of the weight as the layer stores it, or would if it were not quantized."""
    return stored_weight(layer.dense() if isinstance(layer, QuantizedLinear) else layer).shape


def weight_device(layer: nn.Module) -> torch.device:
    """Where the layer's weight is."""
    return layer.device if isinstance(layer, QuantizedLinear) else stored_weight(layer).device


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype a merged weight takes unless told otherwise: what it is stored in, or would be if not quantized."""
    return layer.merge_dtype if isinstance(layer, QuantizedLinear) else stored_weight(layer).dtype


def layer_bias(layer: nn.Module) -> nn.Parameter | None:
    """The layer's bias of shape ``(O,)``, or None; embeddings have none."""
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return a plain layer with ``weight`` and the bias of ``layer``, which is left untouched.

    A dense layer's own class, hooks and mode are kept, so that whatever the user hung on it stays; in the place of a
    quantized one stands torch's own (``nn.Linear``, ``nn.Embedding``).
    """
    plain: nn.Module
    if isinstance(layer, QuantizedLinear):
        plain = layer.dense()
    else:
        plain = copy.copy(layer)
        plain._parameters = dict(layer._parameters)  # a shallow copy shares the dict; this one gets its own weight
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer_bias(layer)
    if bias is not None:
        plain.register_parameter("bias", nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad))
    return plain.train(layer.training)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, present and future, in the place of its own.

    The very dicts are shared, so that the handles users hold still remove them.
    """
    for key in _HOOKS:
        vars(target)[key] = vars(source)[key]


def is_called_as_it_is(layer: nn.Module) -> bool:
    """Whether calling ``layer`` runs its class's ``forward`` and nothing else: no hook, nothing put in its place."""
    own = vars(layer)
    return "forward" not in own and not any(own[key] for key in _HOOKS)


def hand_over_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the hooks of ``source``, which keeps none."""
    share_hooks(source, target)
    share_hooks(nn.Module(), source)
