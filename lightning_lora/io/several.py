"""Several adapters of one model on disk, where PEFT's ``save_pretrained`` puts them.

The adapter ``default`` is in the folder itself, every other in a folder inside that has its name.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io.adapter_file import CONFIG
from lightning_lora.io.adapter_folder import load_adapter, save_adapter
from lightning_lora.model.active import activate
from lightning_lora.model.layers import adapter_names, require_adapters

_DEFAULT = "default"


def save_adapters(model: nn.Module, path: str | PathLike[str], *names: str) -> None:
    """Write several adapters to one folder, as PEFT does: ``default`` to it, each other to ``<path>/<name>``.

    Args:
        model: The model that holds them.
        path: The folder.
        names: Which; none named means all.

    Raises:
        AdapterError: If there is no such adapter, or the format cannot hold one; those before it are written.
        OSError: If a folder cannot be written.
    """
    require_adapters(model, *names)
    for name in names or adapter_names(model):
        save_adapter(model, _folder(Path(path), name), name)


def load_adapters(
    model: nn.Module, path: str | PathLike[str], *names: str, allow_base_mismatch: bool = False
) -> nn.Module:
    """Load several adapters from one folder into ``model``, in place, and return the model.

    Args:
        model: The base model they were trained on, plain or with adapters.
        path: The folder.
        names: Which; none named means all. The first of them is active afterwards.
        allow_base_mismatch: See :func:`~lightning_lora.io.adapter_folder.load_adapter`.

    Raises:
        AdapterError: If the folder holds no such adapter, or one of them is damaged or does not fit; those before it
            are loaded.
    """
    folder = Path(path)
    held = names_in(folder)
    wanted = names or tuple(held)
    absent = [name for name in wanted if name not in held]
    if absent or not held:
        raise AdapterError(
            f"{folder} has no adapter {listing(absent) or 'at all'}; it holds: {listing(held) or 'none'}"
        )
    for name in wanted:
        load_adapter(model, _folder(folder, name), name, allow_base_mismatch=allow_base_mismatch)
    activate(model, wanted[0])
    return model


def names_in(folder: Path) -> list[str]:
    """The names of the adapters in a folder, ``default`` first."""
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    return [*([_DEFAULT] if (folder / CONFIG).is_file() else []), *inside]


def _folder(folder: Path, name: str) -> Path:
    return folder if name == _DEFAULT else folder / name
