"""From files to a model, piece by piece: read ahead by a thread, brought to the device, packed, and kept aside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import nn

from lightning_lora.errors import LoadError, TargetError, listing
from lightning_lora.loading.pieces import Loaded, Piece, Target
from lightning_lora.loading.read_ahead import read_ahead
from lightning_lora.loading.reader import Reader
from lightning_lora.loading.staged import Staged
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.progress import progress
from lightning_lora.nn.base import QuantizedLinear, adopter_of

_AHEAD = 2**27
"""Bytes in memory at once, of files: some layers ahead."""


def stream(pieces: Sequence[Piece], reader: Reader, target: Target) -> Staged:
    """Read every piece, and return what they become; nothing is put in its place yet."""
    staged = Staged()

    def read(piece: Piece) -> list[Loaded]:
        return [piece.read(reader)]

    with closing(read_ahead(progress(pieces, "loading"), read, _AHEAD)) as loaded:
        for _, values in loaded:
            values.pop().stage(target, staged)  # popped: what was read is gone before the next is waited for
    return staged


def device_for(device: torch.device | str | None) -> torch.device:
    """Where to load to: unless told, where tensors are made here, which in ``configure_model`` is the run's device.

    Raises:
        ValueError: If that is the meta device.
    """
    chosen = torch.get_default_device() if device is None else torch.device(device)
    if chosen.type == "meta":
        raise ValueError(
            "the meta device holds no weights; load the base after the block of torch.device('meta') that builds the "
            "model, or pass device="
        )
    return chosen


def require_plain(model: nn.Module, what: str) -> None:
    """Raise unless nothing in a model is adapted or quantized.

    Raises:
        LoadError: Naming what is.
        TargetError: If a parameter has no shape yet.
    """
    changed = list(adapted_layers(model))
    changed += [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) or adopter_of(module) is not None
    ]
    if changed:
        raise LoadError(
            f"{listing(changed)} is adapted or quantized already. {what} fills a model as it was built, before "
            "inject(model, ...) and quantize(model)"
        )
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise TargetError(f"{listing(lazy)} is lazy and has no shape yet; run the model once on a batch first")
