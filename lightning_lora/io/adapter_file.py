"""The two files of an adapter folder, parsed and checked by themselves, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.atomic import replacing
from lightning_lora.io.keys import split_adapter_key
from lightning_lora.model.merge import is_finite

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_METADATA = "lightning_lora"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE = (
    "holds a pickle, which can run code when it is read; refused. In a place you trust, convert it: "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), 'adapter_model.safetensors')"
)


@dataclass(frozen=True)
class AdapterFile:
    """A parsed adapter folder: its settings, its tensors by layer, and all other tensors by name."""

    settings: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None


def write(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Write both files; the old pair stays until both new ones are on disk.

    Args:
        folder: Where to; made if it is not there.
        tensors: Tensors by their on-disk names.
        settings: ``adapter_config.json``.
        metadata: What the header of the weights says of them, to be compared with the settings when they are read.

    Raises:
        OSError: If the folder cannot be written.
    """
    texts = {"format": "pt", _METADATA: json.dumps(metadata, sort_keys=True)}
    # Cloned: safetensors refuses tensors that share memory, as a trained head and its tied embedding do.
    copies = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    data = save(copies, texts)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
        weights.write_bytes(_with_sorted_header(data))
        config.write_bytes(peft.dump(settings))


def read(folder: Path) -> AdapterFile:
    """Parse a folder.

    Raises:
        AdapterError: If it is not there, incomplete, damaged or a pickle, or uses what cannot be loaded.
    """
    if folder.is_file():
        pickled = folder.suffix in _PICKLES
        raise AdapterError(_PICKLE if pickled else f"is a file; pass the folder that holds {CONFIG} and {WEIGHTS}")
    if not folder.is_dir():
        raise AdapterError("no such folder")
    absent = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if WEIGHTS in absent and any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise AdapterError(_PICKLE)
    if absent:
        raise AdapterError(f"{listing(absent)} is missing; a complete adapter has both {CONFIG} and {WEIGHTS}")
    try:
        settings = peft.parse((folder / CONFIG).read_bytes())
        peft.check_supported(settings)
    except AdapterError as error:
        raise AdapterError(f"{CONFIG}: {error}") from None
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    adapters: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        split = split_adapter_key(key)
        if split is None:
            others[key] = tensor
        else:
            adapters.setdefault(split[0], {})[split[1]] = tensor
    return AdapterFile(settings, adapters, others, metadata)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
            metadata = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path.name} is truncated or no safetensors file ({error})") from None
    foreign = [key for key, tensor in tensors.items() if tensor.dtype not in _DTYPES and split_adapter_key(key)]
    if foreign:
        raise AdapterError(f"{path.name} holds {tensors[foreign[0]].dtype} in {listing(foreign)}, expected floats")
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor.float())]
    if broken:
        raise AdapterError(f"{path.name} holds NaN or infinity in {listing(broken)}")
    try:
        return tensors, None if metadata is None else dict(json.loads(metadata))
    except (TypeError, ValueError, RecursionError):
        raise AdapterError(f"{path.name} has a damaged header") from None


def _with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: safetensors writes metadata in an order it draws each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
