"""The two files of an adapter folder, parsed and checked by themselves, without a model.

They are read in two steps. ``read`` allocates nothing: it takes the header of the weights alone, so that whatever a
file claims is compared with the model before a byte of it is believed. ``load`` then reads the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.atomic import replacing_all
from lightning_lora.io.description import KEY, VERSION
from lightning_lora.io.dtypes import DTYPES
from lightning_lora.io.keys import adapter_key, split_adapter_key
from lightning_lora.io.notes import tell
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.fingerprint import sha256

AGAIN = "Put back what was saved, or copy the folder again from where it came from"
"""The remedy for damage."""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_HEADER_BYTES = 32 * 2**20
_REPLACED, _SETTINGS = "replaced_config_sha256", "config"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE = (
    "holds a pickle, which can run code when it is read; refused. Convert it to safetensors, by a reader that runs no "
    "code: lightning-lora convert {} --out FOLDER"
)


@dataclass(frozen=True)
class AdapterFile:
    """A parsed adapter folder: its settings, its tensors by layer, and all other tensors by name.

    As :func:`read` returns it, the tensors are on the meta device: shapes and dtypes, as the file says they are.
    ``configs`` are those of layers whose settings are not as they are here, and ``biases`` those that are trained, by
    layer; both are told apart once there is a model.
    """

    settings: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None
    configs: Mapping[str, AdapterConfig] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)


def write(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Write both files; the old pair stays until both new ones are on disk.

    Two files cannot take their places in one step. Where an adapter with another config is written over, the header of
    the weights, which come first, says which config they replace and what takes its place: a reader that finds the old
    one, because the writer was killed between the two, has the new one.

    Args:
        folder: Where to; made if it is not there.
        tensors: Tensors by their on-disk names.
        settings: ``adapter_config.json``.
        metadata: What the header of the weights says of them, to be compared with the settings when they are read.
            SHA-256 of every tensor is added.

    Raises:
        OSError: If the folder cannot be written.
    """
    copies = _copies(tensors)
    said = {**metadata, "sha256": {key: sha256(tensor) for key, tensor in copies.items()}}
    replaced = _config_bytes(folder)
    if replaced is not None and replaced != peft.dump(settings):
        said |= {_REPLACED: hashlib.sha256(replaced).hexdigest(), _SETTINGS: settings}
    data = save(copies, {"format": "pt", KEY: json.dumps(said, sort_keys=True)})
    _write_both(folder, data, settings)


def write_foreign(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write both files of an adapter that another program has made, of which nothing more is known.

    Raises:
        OSError: If the folder cannot be written.
    """
    _write_both(folder, save(_copies(tensors), {"format": "pt"}), settings)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cloned: safetensors refuses tensors that share memory, as a trained head and its tied embedding do."""
    return {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _write_both(folder: Path, data: bytes, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all([folder / WEIGHTS, folder / CONFIG]) as (weights, config):
        weights.write_bytes(_with_sorted_header(data))
        config.write_bytes(peft.dump(settings))


def read(folder: Path) -> AdapterFile:
    """Parse a folder without reading its tensors.

    Raises:
        AdapterError: If it is not there, incomplete, damaged or a pickle, or uses what cannot be loaded.
    """
    if folder.is_file():
        pickled = folder.suffix in _PICKLES
        raise AdapterError(
            _PICKLE.format(folder) if pickled else f"is a file; pass the folder that holds {CONFIG} and {WEIGHTS}"
        )
    if not folder.is_dir():
        raise AdapterError("no such folder")
    absent = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if WEIGHTS in absent and any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise AdapterError(_PICKLE.format(folder))
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if len(absent) == 2 and inside:
        raise AdapterError(
            f"holds several adapters, each in a folder of its own: {listing(inside)}. Pass that folder, or use "
            "load_adapters(model, folder)"
        )
    if absent:
        raise AdapterError(f"{listing(absent)} is missing; a complete adapter has both {CONFIG} and {WEIGHTS}. {AGAIN}")
    with _opened(folder / WEIGHTS) as file:
        tensors = {key: _outline(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
        metadata = _metadata(file.metadata() or {})
    try:
        settings = _settings(folder, metadata)
    except AdapterError as error:
        raise AdapterError(f"{CONFIG}: {error}") from None
    foreign = [key for key, tensor in tensors.items() if tensor.dtype not in _FLOATS and split_adapter_key(key)]
    if foreign:
        raise AdapterError(
            f"{WEIGHTS} holds {tensors[foreign[0]].dtype} in {listing(foreign)}, expected floats. {AGAIN}"
        )
    if metadata is not None:
        _check_sums_cover(metadata, tensors)
    return _sorted_out(settings, tensors, metadata)


def load(folder: Path, file: AdapterFile) -> AdapterFile:
    """Read the tensors of a folder whose header has been found good.

    Raises:
        AdapterError: If a tensor is not what was written, or not finite, or the file has been replaced since.
    """
    with _opened(folder / WEIGHTS) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    outline = {key: (tensor.shape, tensor.dtype) for key, tensor in _flat(file).items()}
    if outline != {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}:
        raise AdapterError(f"{WEIGHTS} was replaced while it was being read; load it again")
    sums = {} if file.metadata is None else file.metadata["sha256"]
    changed = [key for key in sums if sha256(tensors[key]) != sums[key]]
    if changed:
        raise AdapterError(
            f"{WEIGHTS} is damaged: the bytes of {listing(changed)} are not those that were written (SHA-256). Copy it "
            "again from where it came from, or go back to another checkpoint"
        )
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor.float())]
    if broken:
        raise AdapterError(
            f"{WEIGHTS} holds NaN or infinity in {listing(broken)}. The training diverged: go back to another save"
        )
    return _sorted_out(file.settings, tensors, file.metadata)


def _settings(folder: Path, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config; the one that belongs to the weights where it did not come to take its place."""
    data = _config_bytes(folder)
    if data is None:
        size = (folder / CONFIG).stat().st_size
        raise AdapterError(f"it has {size:,} bytes, more than any adapter config ({peft.MAX_CONFIG_BYTES:,})")
    if metadata is not None and metadata.get(_REPLACED) == hashlib.sha256(data).hexdigest():
        tell(f"{folder}: {CONFIG} is of an earlier save, the last was interrupted; its config is in {WEIGHTS}")
        data = json.dumps(metadata.get(_SETTINGS)).encode()
    with _remedied():
        settings = peft.parse(data)
    peft.check_supported(settings)
    with _remedied():
        peft.check_complete(settings)
    return settings


@contextmanager
def _remedied() -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{error}. {AGAIN}") from None


def _config_bytes(folder: Path) -> bytes | None:
    """What the config file holds, or None if there is none, or none that can be."""
    path = folder / CONFIG
    small = path.is_file() and path.stat().st_size <= peft.MAX_CONFIG_BYTES
    return path.read_bytes() if small else None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The weights, opened. safetensors checks that tensors fill the file without overlap; the header's size is ours."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path.name} is no safetensors file, or damaged: its header would have {size:,} bytes, more than any "
                f"adapter's ({MAX_HEADER_BYTES:,}). {AGAIN}"
            )
        with safe_open(path, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path.name} is truncated or no safetensors file ({error}). {AGAIN}") from None


def _outline(part: Any) -> Tensor:
    """A tensor of the shape and dtype that a header gives, without memory."""
    name = part.get_dtype()
    if name not in DTYPES:
        raise AdapterError(f"{WEIGHTS} holds tensors of dtype {name}, which no adapter has. {AGAIN}")
    return torch.empty(part.get_shape(), dtype=DTYPES[name], device="meta")


def _metadata(texts: Mapping[str, str]) -> dict[str, Any] | None:
    """What we wrote into the header, or None for a file by another program."""
    if KEY not in texts:
        return None
    try:
        metadata = json.loads(texts[KEY])
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise AdapterError(f"{WEIGHTS} has a damaged header. {AGAIN}")
    version = metadata.get("version")
    if version != VERSION:
        raise AdapterError(
            f"{WEIGHTS} is of format version {version!r:.80}, and this lightning_lora reads version {VERSION}. "
            "Update it: pip install -U lightning-lora"
        )
    return metadata


def _check_sums_cover(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    sums = metadata.get("sha256")
    if not isinstance(sums, dict):
        raise AdapterError(f"{WEIGHTS} has a damaged header: it lacks the checksums of the tensors. {AGAIN}")
    lost, extra = sorted(sums.keys() - tensors.keys()), sorted(tensors.keys() - sums.keys())
    if lost or extra:
        raise AdapterError(
            f"{WEIGHTS} was changed since it was written: it lacks {listing(lost) or 'nothing'} and has beyond what "
            f"was written {listing(extra) or 'nothing'}. {AGAIN}"
        )


def _sorted_out(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None
) -> AdapterFile:
    adapters: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        split = split_adapter_key(key)
        if split is None:
            others[key] = tensor
        else:
            adapters.setdefault(split[0], {})[split[1]] = tensor
    return AdapterFile(settings, adapters, others, metadata)


def _flat(file: AdapterFile) -> dict[str, Tensor]:
    adapters = {adapter_key(path, leaf): t for path, leaves in file.adapters.items() for leaf, t in leaves.items()}
    return {**adapters, **file.others}


def _with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: safetensors writes metadata in an order it draws each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
