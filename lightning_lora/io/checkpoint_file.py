"""A Lightning checkpoint as a file: whether it is whole, and whether it is what was written.

torch checks no sums when it reads, so a flipped bit is another weight. Its archives hold a CRC-32 of every record,
which is compared here before anything is unpickled; and a checkpoint of ours is sealed with SHA-256 of each weight and
of its description, which an edit that is saved again breaks too.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.description import KEY, VERSION
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.fingerprint import is_held, sha256

_SEAL = "sha256"
_LIGHTNING = "pytorch-lightning_version"
_UNSEALED = ("processes", _SEAL)


def require_whole(path: Path) -> None:
    """See that a file is there, complete, and holds the bytes that were written; nothing of it is unpickled.

    Raises:
        CheckpointError: If not; the message names the newest file beside it that is whole.
    """
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} is an adapter folder, no checkpoint. Use load_adapter(model, path)")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint{_instead(path)}")
    reason = _damage(path)
    if reason is not None:
        raise CheckpointError(f"{path} is damaged: {reason}. An interrupted copy, or a failing disk?{_instead(path)}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of adapters, whole and as it was written; no code in it is run.

    Raises:
        CheckpointError: If it is damaged, or not of adapters.
    """
    require_whole(path)
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, and none names the file
        raise not_plain(path, error) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise CheckpointError(
            f"{path} was not written by LoRACallback; the module's own load_from_checkpoint reads it if it holds the "
            "whole model"
        )
    require_sealed(checkpoint, path)
    return checkpoint


def not_plain(path: object, error: Exception) -> CheckpointError:
    """The error for a checkpoint that torch's restricted reader refuses, which names neither file nor remedy."""
    return CheckpointError(
        f"{path} holds other than plain data, which could run code, and is not read ({refused(error)}). If you wrote "
        "it and trust it: torch.load(path, weights_only=False), take that out, and save it again"
    )


def refused(error: Exception) -> str:
    """What torch's restricted reader did not want to read, in a line: the name, where it says one."""
    lines = str(error).splitlines() or [""]
    named = next((line for line in lines if "GLOBAL" in line), lines[0])
    return f"{type(error).__name__}: {named:.200}"


def seal(checkpoint: dict[str, Any]) -> None:
    """Put SHA-256 of each weight, and of the description, into a checkpoint's entry, last of all."""
    state = checkpoint["state_dict"]
    sums = {key: sha256(tensor) for key, tensor in state.items() if is_held(tensor)}
    checkpoint[KEY][_SEAL] = {"description": _described(checkpoint[KEY]), "tensors": sums}


def require_sealed(checkpoint: Mapping[str, Any], path: object) -> None:
    """See that a checkpoint of adapters is of a known version, finite, and as it was sealed.

    Raises:
        CheckpointError: If not; the message names the tensors.
    """
    entry, state = checkpoint[KEY], checkpoint.get("state_dict")
    if entry.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of format version {entry.get('version')!r:.80}, and this lightning_lora reads {VERSION}. "
            "Update it: pip install -U lightning-lora"
        )
    if not isinstance(checkpoint.get(_LIGHTNING), str):
        raise CheckpointError(f"{path} is no whole Lightning checkpoint: it lacks {_LIGHTNING}{_instead(path)}")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds no weights")
    broken = [key for key, tensor in state.items() if ".adapters." in key and not is_finite(tensor.float())]
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinity in {listing(broken)}: training diverged{_instead(path)}")
    if _SEAL in entry:
        _compare(entry[_SEAL], checkpoint, path)


def _compare(sealed: Any, checkpoint: Mapping[str, Any], path: object) -> None:
    state = checkpoint["state_dict"]
    sums = sealed.get("tensors") if isinstance(sealed, dict) else None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path} is damaged: its checksums cannot be read{_instead(path)}")
    lost, extra = sorted(sums.keys() - state.keys()), sorted(state.keys() - sums.keys())
    if lost or extra:
        raise CheckpointError(
            f"{path} lacks {listing(lost) or 'nothing'} and has beyond what is trained {listing(extra) or 'nothing'}"
        )
    changed = [key for key, tensor in state.items() if sha256(tensor) != sums[key]]
    changed += ["its description"] if sealed.get("description") != _described(checkpoint[KEY]) else []
    if changed:
        raise CheckpointError(
            f"{path} was changed since it was written: {listing(changed)} (SHA-256). If that was meant, drop "
            f"checkpoint[{KEY!r}][{_SEAL!r}] before you save it{_instead(path)}"
        )


def _described(entry: Mapping[str, Any]) -> str:
    described = {name: value for name, value in entry.items() if name not in _UNSEALED}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _damage(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        if not zipfile.is_zipfile(path):
            return f"it is cut short, or no file by torch.save ({path.stat().st_size:,} bytes)"
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
            if unpacked > path.stat().st_size:
                return f"it is compressed, as no file by torch is ({unpacked:,} bytes unpacked)"
            record = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None if record is None else f"the bytes of {record!r} are not those that were written (CRC-32)"


def _instead(path: object) -> str:
    """Name the newest whole checkpoint in the same folder."""
    folder = Path(str(path)).parent
    others = [other for other in folder.glob("*.ckpt") if other != path] if folder.is_dir() else []
    for other in sorted(others, key=lambda each: each.stat().st_mtime, reverse=True)[:10]:
        if _damage(other) is None:
            return f". The newest whole one there is {other}"
    return ""
