"""``load_quantized``: a base as it was saved in few bits, to its place in a model, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import LoadError, QuantizationError, listing
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.keys import canonical
from lightning_lora.io.quantized_header import QuantizedHeader, StoredLayer, read_header
from lightning_lora.io.shards import QUANTIZED
from lightning_lora.loading.buffers import recomputed_buffers, refuse_lost_attributes
from lightning_lora.loading.names import match_exactly, places
from lightning_lora.loading.pieces import DensePiece, Target
from lightning_lora.loading.reader import Reader, opened
from lightning_lora.loading.staged import Staged
from lightning_lora.loading.stream import device_for, require_plain, stream
from lightning_lora.model.layers import replace
from lightning_lora.model.split import layer_at, module_around, named_layers, taken_apart
from lightning_lora.nn.base import hand_over_hooks, stored_weight
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.quantization.formats import FrozenLayer, from_storage, linear_class
from lightning_lora.quantization.pack import packed_layer


@torch.no_grad()
def load_quantized(
    model: nn.Module, path: str | PathLike[str], *, device: torch.device | str | None = None
) -> nn.Module:
    """Load what :func:`save_quantized` has written into a model built on the meta device, in place, and return it.

    Bit for bit the model that was saved, with the fingerprints of its dense weights. Strict: every tensor of the files
    has its place and every place its tensor, each is compared with its checksum, and the model changes when all have
    been read. Names are those of the model that was saved; what the model ties is tied afterwards.

    Args:
        model: As for :func:`load_base`, of the class that was saved.
        path: The folder.
        device: Where to; None is where tensors are made by default, which in ``configure_model`` is the run's device.

    Raises:
        LoadError: If the folder holds no quantized base, or a damaged one, or does not fit the model.
    """
    where = device_for(device)
    require_plain(model, "load_quantized")
    refuse_lost_attributes(model)
    files = opened(Path(path), QUANTIZED)
    header = read_header(files)
    with where:  # small tensors that are made on the way belong there too
        layers = _Layers(model, files, where).all(header)
        swaps = _swaps(model, layers)
        replace(model, swaps)
        try:
            staged = _streamed(model, files, header, where)
        except BaseException:
            replace(model, {new: old for old, new in swaps.items()})
            raise
        staged.install(model)
    for old, new in swaps.items():
        hand_over_hooks(old, new)
    for name, origin in header.base_fingerprint.items():
        layers[name].remember(origin)
    return model


class _Layers:
    """The quantized layers of a folder, without values, for the places they have in a model.

    Args:
        model: Built as the one that was saved.
        files: What was saved.
        device: Where the layers will compute.
    """

    def __init__(self, model: nn.Module, files: BaseFiles, device: torch.device) -> None:
        self._model, self._files, self._device = model, files, device
        self._live = {canonical(path): path for path, _ in named_layers(model)}

    def all(self, header: QuantizedHeader) -> dict[str, FrozenLayer]:
        """All of them, by their names in the files, each with the name of the layer in the model as ``path``."""
        absent = [name for name in header.layers if name not in self._live]
        if absent:
            raise LoadError(
                f"{self._files.folder} does not fit {type(self._model).__name__}, which has no {listing(absent)}. "
                "Build the model as it was saved"
            )
        return {name: self._layer(name, stored) for name, stored in header.layers.items()}

    def _layer(self, name: str, stored: StoredLayer) -> FrozenLayer:
        base = layer_at(self._model, self._live[name])
        if not isinstance(base, nn.Linear | StackedWeight):
            raise LoadError(f"{self._files.folder}: {name} is a linear layer there and a {type(base).__name__} here")
        try:
            stored_as: Any = from_storage(stored.storage)
            compute = None if stored.compute_dtype is None else getattr(torch, stored.compute_dtype)
            config = dataclasses.replace(stored_as, compute_dtype=compute)
            outline = {leaf: self._files.outline[f"{name}.{leaf}"] for leaf in linear_class(config).tensors}
            made = packed_layer(base, config, outline, getattr(torch, stored.dtype))
        except KeyError as error:
            raise LoadError(f"{self._files.folder} lacks {error}") from None
        except (ValueError, QuantizationError) as error:
            raise LoadError(f"{self._files.folder}: {name} does not fit the model: {error}") from None
        reason = type(made).refusal(stored_weight(base).detach().to("meta"), self._device)
        if reason is not None:
            raise LoadError(f"{self._files.folder}: {name} cannot be used on {self._device}: {reason}")
        return made


def _swaps(model: nn.Module, layers: Mapping[str, FrozenLayer]) -> dict[nn.Module, nn.Module]:
    """What takes the place of what: a layer of a layer, and a module taken apart of one around several."""
    live = {canonical(path): path for path, _ in named_layers(model)}
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        around = module_around(model, live[name])
        if around is None:
            swaps[model.get_submodule(live[name])] = layer
        else:
            split = swaps.setdefault(around, taken_apart(around))
            split.add_module(live[name].rpartition(".")[2], layer)
    if model in swaps:
        raise LoadError(
            "the model is itself a layer that was quantized and cannot replace itself; wrap it as it was saved"
        )
    return swaps


def _streamed(model: nn.Module, files: BaseFiles, header: QuantizedHeader, device: torch.device) -> Staged:
    found = places(model)
    sources = match_exactly(model, found, files.outline, files.folder)
    absent = [place for place in found if place not in sources]
    computed = recomputed_buffers(model, [place.names[0] for place in absent if place.outline.is_meta])
    pieces = [
        DensePiece(sum(files.outline[name].nbytes for name in names), place.names, names)
        for place, names in sources.items()
    ]
    staged = stream(pieces, Reader(files, device.type == "cuda", header.sha256), Target(device, None))
    for place in absent:
        staged.tensor(place.names, computed.get(place.names[0], place.outline).to(device))
    return staged
