"""Tensors of safetensors files, read into memory of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from lightning_lora.errors import AdapterError, LoadError
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.shards import MODEL, Naming
from lightning_lora.nn.fingerprint import sha256


@dataclass(frozen=True)
class Reader:
    """Reads one tensor at a time; its file is mapped for that long.

    What is read is copied: of a map, memory would go on belonging to a file that others may change. On the way to a GPU
    it is pinned, so that it can be copied there while the next one is read.

    Attributes:
        files: Where from.
        pinned: Whether into memory that a GPU reads from.
        sums: SHA-256 of each tensor, where the files say it.
    """

    files: BaseFiles
    pinned: bool
    sums: Mapping[str, str] | None = None

    def __call__(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            LoadError: If the file can no longer be read, or holds other bytes than it says.
        """
        try:
            tensor = self.files.read(name)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{name} cannot be read any more ({error}); was the file changed meanwhile?") from None
        tensor = tensor.pin_memory() if self.pinned else tensor.clone()
        if self.sums is not None and self.sums.get(name) != sha256(tensor):
            raise LoadError(f"{self.files.folder}: {name} is damaged: its bytes are not those that were saved")
        return tensor


def opened(path: Path, naming: Naming = MODEL) -> BaseFiles:
    """Open a model's files, called so.

    Raises:
        LoadError: If there are none, or they are damaged.
    """
    try:
        return BaseFiles(path, naming)
    except AdapterError as error:
        raise LoadError(str(error)) from None
