"""Which base model an adapter belongs to: the fingerprints of the weights under it, from before they were quantized.

An adapter is an update of certain weights. Over others of the same shapes it computes something else, and nothing but
the loss would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import LoRAError, listing
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, adopter_of
from lightning_lora.nn.fingerprint import Fingerprint, combined, fingerprint, fingerprints

Saved = dict[str, dict[str, Any]]
"""Fingerprints as plain data, by layer."""


@dataclass
class Comparison:
    """What became of comparing a model with the base that a file names.

    Attributes:
        differ: Layers whose weight is another one, with what differs.
        unchecked: Layers that could not be compared, with the reason.
        theirs: Fingerprints in the file of the layers that could be compared.
        ours: The model's.
    """

    differ: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    theirs: list[Fingerprint] = field(default_factory=list)
    ours: list[Fingerprint] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Take in the comparison of further layers."""
        self.differ |= other.differ
        self.unchecked |= other.unchecked
        self.theirs += other.theirs
        self.ours += other.ours

    def __str__(self) -> str:
        there, here = combined(self.theirs), combined(self.ours)
        layers = listing(f"{path} ({what})" for path, what in self.differ.items())
        return f"it was trained on base {there} and this model is {here}, another one in {layers}"


def base_fingerprint(layers: Mapping[str, nn.Module]) -> dict[str, Fingerprint]:
    """Take the fingerprints of the weights of ``layers``, which may be adapted, plain or quantized.

    Layers of which this process holds only a part, or nothing yet, are left out.
    """
    bases = {path: _base(layer) for path, layer in layers.items()}
    dense = {path: weight for path, base in bases.items() if (weight := _dense(base)) is not None}
    packed = {path: base.fingerprint() for path, base in bases.items() if isinstance(base, QuantizedLinear)}
    found = {**fingerprints(dense), **{path: each for path, each in packed.items() if each is not None}}
    return {path: found[path] for path in layers if path in found}


def to_json(found: Mapping[str, Fingerprint]) -> Saved:
    """As plain data, for a checkpoint or the header of a file."""
    return {path: each.to_json() for path, each in found.items()}


def compare(saved: Any, layers: Mapping[str, nn.Module], here: Saved | None = None) -> Comparison:
    """Compare the fingerprints of a file with a model's layers, by the same names.

    A weight of a wider dtype than in the file is rounded to that first: the training began so.

    Args:
        saved: What the file says.
        layers: The layers, adapted or plain.
        here: Their fingerprints, where they have been taken already.

    Raises:
        ValueError: If ``saved`` holds no fingerprints.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"{saved!r:.80} holds no fingerprints of weights")
    theirs = {path: Fingerprint.from_json(saved[path]) for path in layers if path in saved}
    ours = base_fingerprint(layers) if here is None else {path: Fingerprint.from_json(here[path]) for path in here}
    result = Comparison()
    for path, layer in layers.items():
        if path not in theirs or path not in ours:
            result.unchecked[path] = "the file has no fingerprint of it" if path in ours else "its weight is not here"
            continue
        found = _comparable(theirs[path], ours[path], _base(layer))
        if found is None:
            result.unchecked[path] = f"its weight is {ours[path].stored} here and was {theirs[path].stored} there"
            continue
        result.theirs.append(theirs[path])
        result.ours.append(found)
        what = _difference(theirs[path], found)
        if what is not None:
            result.differ[path] = what
    return result


def _comparable(theirs: Fingerprint, ours: Fingerprint, base: nn.Module) -> Fingerprint | None:
    """Our fingerprint in the form that can be compared with theirs, or None if there is none."""
    if theirs.stored != ours.stored:
        packed = isinstance(base, QuantizedLinear) and base.storage == theirs.stored
        return base.packed_fingerprint() if packed and isinstance(base, QuantizedLinear) else None
    weight, narrow = _dense(base), getattr(torch, theirs.dtype)
    if weight is not None and weight.dtype != narrow and torch.promote_types(narrow, weight.dtype) == weight.dtype:
        return fingerprint(weight.detach().to(narrow), whole=theirs.whole is not None)
    return ours


def _dense(base: nn.Module) -> Tensor | None:
    """The weight of a layer that holds one as a parameter of its own."""
    return None if isinstance(base, QuantizedLinear) else dict(base.named_parameters(recurse=False)).get("weight")


def _difference(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    if theirs.shape != ours.shape:
        return f"shape {theirs.shape} there and {ours.shape} here"
    if theirs.dtype != ours.dtype:
        return f"{theirs.dtype} there and {ours.dtype} here"
    return None if ours.same_bytes(theirs) else "other values"


def _base(layer: nn.Module) -> nn.Module:
    base = layer.base_layer if isinstance(layer, AdaptedLayer) else layer
    adopter = adopter_of(base)
    if adopter is None or isinstance(base, QuantizedLinear):
        return base
    bias = base.bias if isinstance(base.bias, nn.Parameter) else None
    trained = bias is not None and bias.requires_grad
    try:
        adopted: nn.Module = adopter(base)  # freezes the bias, which is not to be changed by looking
    except LoRAError:  # one that cannot be adapted either, as injection will say
        adopted = base
    if bias is not None:
        bias.requires_grad_(trained)
    return adopted
