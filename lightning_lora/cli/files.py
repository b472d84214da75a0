"""``lightning-lora inspect``, ``verify`` and ``convert``: what is in a file, is it sound, and in another form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_lora.cli import console
from lightning_lora.errors import AdapterError, UnsupportedError
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.conversion import checkpoint_to_folder, folder_to_checkpoint, unpickle
from lightning_lora.io.inspection import inspect as inspected
from lightning_lora.io.inspection import kind_of_path, require_sound
from lightning_lora.io.merge_files import check_against
from lightning_lora.io.quantized_header import check_sums
from lightning_lora.io.shards import QUANTIZED

_SHOWN = 40
_PICKLES = (".bin", ".pt", ".pth")


def inspect(options: argparse.Namespace) -> int:
    """Print what is at a path, as tables or as JSON."""
    found = inspected(local(options.path))
    if options.json:
        console.line(json.dumps(found, indent=2))
        return 0
    layers, readers = found.pop("layers", []), found.pop("readers")
    console.table(
        found.pop("what"), ("", ""), [(key, _brief(value)) for key, value in found.items() if value is not None]
    )
    if layers:
        norms = list(dict.fromkeys(key for each in layers for key in each if key not in ("name", "norm_update")))
        norms += ["norm_update"] * any(each["norm_update"] is not None for each in layers)
        rows = [(each["name"], *(_number(each.get(norm)) for norm in norms)) for each in layers[:_SHOWN]]
        heads = ["|s B A|" if norm == "norm_update" else f"|{norm.removeprefix('norm_')}|" for norm in norms]
        more = f", {len(layers) - _SHOWN} more with --json" if len(layers) > _SHOWN else ""
        console.table(f"{len(layers)} layers{more}", ("layer", *heads), rows)
    console.table("who can read it", ("program", ""), list(readers.items()))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check what is at a path, against its base too if that is given, and say what was checked."""
    path = local(options.path)
    kind = kind_of_path(path)
    if options.base is not None and kind != "adapter":
        raise UnsupportedError(
            f"--base is compared with an adapter folder, and {path} is a {kind}. Convert it first: lightning-lora "
            "convert"
        )
    found = inspected(path)
    checked = {
        "adapter": ["files complete", "settings and header agree", "tensors finite"],
        "checkpoint": ["file readable without running code", "adapter complete", "tensors finite"],
        "merged": ["files complete", "header and sizes agree"],
        "quantized": ["files complete", "header and sizes agree"],
    }[kind]
    if found.get("written_by") == "lightning_lora":
        checked.append("SHA-256 of every tensor")
    if kind == "merged":
        require_sound(BaseFiles(path))
        checked.append("tensors finite")
    if kind == "quantized":
        check_sums(BaseFiles(path, QUANTIZED))
        checked.append("SHA-256 of every tensor")
    unknown = check_against(options.base, path) if options.base is not None else []
    if options.base is not None:
        checked.append(f"names and shapes fit {options.base}")
        checked += [] if unknown else ["base is the one trained on"]
    console.table(f"{path}: sound", ("checked",), [(each,) for each in checked])
    if found.get("written_by") == "another program":
        console.line("not checked: the bytes of the tensors; a file by another program has no checksums")
    for each in unknown:
        console.line(f"not checked: {each}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert what is at a path to the other form."""
    path, out = local(options.path), options.out
    folder = path.is_dir()
    pickled = path.suffix in _PICKLES or (folder and not (path / "adapter_model.safetensors").exists())
    if out.exists() and out.resolve() == path.resolve() and not pickled:
        raise AdapterError(f"--out {out} is what is to be converted; choose another")
    if pickled:
        unpickle(path, out)
        console.line(f"read {path} without running code in it")
    elif folder:
        if out.suffix != ".ckpt":
            raise AdapterError(
                f"an adapter folder becomes a Lightning checkpoint: --out has to end in .ckpt, not {out}"
            )
        folder_to_checkpoint(path, out, options.prefix or "")
    else:
        prefix = checkpoint_to_folder(path, out, options.prefix)
        if prefix:
            console.line(f"took {prefix!r} off the names; --prefix sets what to take off")
    console.line(f"wrote {out}")
    return 0


def local(text: str) -> Path:
    """Return a path on this machine.

    Raises:
        UnsupportedError: If it is a URL: what is fetched and read at once has not been looked at by anybody.
    """
    if "://" in text:
        raise UnsupportedError(f"{text} is a URL. Download it first, and pass the file")
    return Path(text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "") or "none"
    if isinstance(value, dict):
        return _brief([f"{key}: {each}" for key, each in value.items()])
    return f"{value:,}" if isinstance(value, int) else str(value)
