"""What the header of a saved quantized base says: how each layer is stored, of which base it is, and every checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_lora.errors import LoadError, listing
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.description import KEY, VERSION
from lightning_lora.io.fingerprint import to_json
from lightning_lora.nn.fingerprint import Fingerprint, sha256


@dataclass(frozen=True)
class StoredLayer:
    """How one layer is stored.

    Attributes:
        storage: In the words of its config: ``nf4/64 double-quantized``.
        dtype: What the weight was, and a merged one will be: ``bfloat16``.
        compute_dtype: What it is dequantized to for each product, or None to follow the input.
    """

    storage: str
    dtype: str
    compute_dtype: str | None

    def __post_init__(self) -> None:
        for name in filter(None, (self.dtype, self.compute_dtype)):
            if not isinstance(getattr(torch, str(name), None), torch.dtype):
                raise ValueError(f"{name!r} is no dtype")


@dataclass(frozen=True)
class QuantizedHeader:
    """What such a file says of itself.

    Attributes:
        layers: How each quantized layer is stored, by name.
        base_fingerprint: Of the dense weights they were made from, as far as those were ever seen.
        sha256: Of every tensor, by its name in the file.
    """

    layers: Mapping[str, StoredLayer]
    base_fingerprint: Mapping[str, Fingerprint]
    sha256: Mapping[str, str]

    def metadata(self) -> dict[str, str]:
        """The entry for the header of each file."""
        entry = {
            "version": VERSION,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "base_fingerprint": to_json(self.base_fingerprint),
            "sha256": dict(self.sha256),
        }
        return {KEY: json.dumps(entry, sort_keys=True)}


def read_header(files: BaseFiles) -> QuantizedHeader:
    """Read what :meth:`QuantizedHeader.metadata` has written.

    Raises:
        LoadError: If it is not there, from a later version, or damaged.
    """
    said: Mapping[str, Any] = files.said
    if said.get("version") != VERSION:
        raise LoadError(f"{files.folder} is of format {said.get('version')!r}, and this version reads {VERSION}")
    try:
        layers = {path: StoredLayer(**stored) for path, stored in said["layers"].items()}
        origins = {path: Fingerprint.from_json(saved) for path, saved in said["base_fingerprint"].items()}
        if not origins.keys() <= layers.keys():
            raise ValueError(f"fingerprints of {listing(origins.keys() - layers.keys())}")
        return QuantizedHeader(layers, origins, dict(said["sha256"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{files.folder} has a damaged header ({error!r}); save the base again") from None


def check_sums(files: BaseFiles) -> None:
    """Compare every tensor with the checksum that the header says.

    Raises:
        LoadError: Naming those that are damaged.
    """
    header = read_header(files)
    broken = [name for name in files.outline if header.sha256.get(name) != sha256(files.read(name))]
    if broken:
        raise LoadError(f"{files.folder}: {listing(broken)} is damaged: its bytes are not those that were saved")
