"""``save_quantized``: the packed tensors of a base as they are, so that the next start has nothing to quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError, listing
from lightning_lora.io.adapter_file import CONFIG
from lightning_lora.io.base_files import MODEL_CONFIG
from lightning_lora.io.dtypes import NAMES
from lightning_lora.io.export import WritesJson, config_text
from lightning_lora.io.keys import canonical
from lightning_lora.io.quantized_header import QuantizedHeader, StoredLayer
from lightning_lora.io.shards import MODEL, QUANTIZED, Part, write_shards
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import adopter_of
from lightning_lora.nn.fingerprint import DENSE, Fingerprint, is_held, sha256
from lightning_lora.quantization.formats import FrozenLayer
from lightning_lora.quantization.frozen_linear import FrozenLinear


@torch.no_grad()
def save_quantized(model: nn.Module, path: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> Path:
    """Write a model whose base is quantized, and that has no adapters, for :func:`load_quantized` to read.

    ``quantized.safetensors``, or shards and their index, with codes and constants as they are and everything else as
    the model has it; a tied tensor once. The header of each file says how each layer is stored, the fingerprints of the
    dense weights, and SHA-256 of every tensor. Files are complete or absent. Beside a Hugging Face model its
    ``config.json`` is written, unless the folder holds the dense model; other programs look for files of other names.

    Args:
        model: From :func:`load_base`, or quantized and then rid of its adapters with :func:`delete_adapter`.
        path: The folder; made if it is not there.
        max_shard_size: Bytes of a file at most, or such as ``"5GB"``.

    Returns:
        The folder.

    Raises:
        QuantizationError: If nothing in the model is quantized, or by bitsandbytes' own layers; if it has adapters;
            if a tensor has no values.
        OSError: If there is no room; what was in the folder before is untouched.
    """
    folder = Path(path)
    layers = _quantized(model)
    if (folder / CONFIG).exists():
        raise QuantizationError(f"{folder} holds an adapter ({CONFIG}); choose another folder for the base")
    tensors = _tensors(model)
    header = QuantizedHeader(
        layers={name: _described(layer) for name, layer in layers.items()},
        base_fingerprint=_origins(layers),
        sha256={name: sha256(tensor) for name, tensor in tensors.items()},
    )
    parts = [_part(name, tensor) for name, tensor in tensors.items()]
    beside = dict(_beside(model, folder))
    write_shards(
        folder, parts, max_shard_size=max_shard_size, metadata=header.metadata(), beside=beside, naming=QUANTIZED
    )
    return folder


def _quantized(model: nn.Module) -> dict[str, FrozenLayer]:
    """The quantized layers by the names that files have."""
    adapted = adapted_layers(model)
    if adapted:
        raise QuantizationError(
            f"{listing(adapted)} holds adapters, which are no part of a base: save_adapter(model, ...) writes them. "
            "Save the base before inject(model, ...), or after delete_adapter(model, name)"
        )
    foreign = [name for name, module in model.named_modules() if adopter_of(module) is not None]
    if foreign:
        raise QuantizationError(
            f"{listing(foreign)} is a layer of bitsandbytes', which keeps its constants outside of its tensors. "
            "inject(model, ...) and delete_adapter(model, 'default') turn it into one of ours"
        )
    found = {canonical(name): module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    if not found:
        raise QuantizationError(
            f"nothing in {type(model).__name__} is quantized. A dense model needs no format of its own: "
            "safetensors.torch.save_model, or export_merged while it has adapters"
        )
    return found


def _origins(layers: Mapping[str, FrozenLayer]) -> dict[str, Fingerprint]:
    """The fingerprints of the dense weights, of those layers whose codes are still the ones made from these."""
    found = {name: layer.fingerprint(whole=False) for name, layer in layers.items()}
    return {name: origin for name, origin in found.items() if origin is not None and origin.stored == DENSE}


def _described(layer: FrozenLayer) -> StoredLayer:
    compute = layer.config.compute_dtype
    return StoredLayer(layer.storage, _word(layer.merge_dtype), None if compute is None else _word(compute))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor once, by the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta or value.dtype not in NAMES or not is_held(value):
            raise QuantizationError(f"{name} is no tensor that this process holds, and safetensors holds nothing else")
        found.setdefault(id(value), (canonical(name), value.detach()))
    return dict(found.values())


def _part(name: str, tensor: Tensor) -> Part:
    return Part({name: tensor.to("meta")}, lambda: {name: tensor})


def _beside(model: nn.Module, folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    config = getattr(model, "config", None)
    if isinstance(config, WritesJson) and not MODEL.is_in(folder):  # a dense model there has its own
        text = config_text(config, type(model).__name__)
        yield MODEL_CONFIG, lambda file: file.write_text(text)
