"""What is in a file or folder of ours, as plain data: an adapter folder, a Lightning checkpoint, a merged model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_lora.errors import AdapterError, CheckpointError, listing
from lightning_lora.io import adapter_file
from lightning_lora.io.adapter_file import CONFIG, AdapterFile
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.description import KEY, describe_loras
from lightning_lora.io.fitting import configs_of
from lightning_lora.io.shards import INDEX, SINGLE
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.fingerprint import Fingerprint, combined
from lightning_lora.nn.lora import SCALINGS

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def kind_of_path(path: Path) -> str:
    """Return ``"adapter"``, ``"checkpoint"`` or ``"merged"``.

    Raises:
        AdapterError: If it is none of these.
    """
    if (path / CONFIG).is_file() or (path / adapter_file.WEIGHTS).is_file():
        return "adapter"
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return "merged"
    if path.is_file() and path.suffix == ".ckpt":
        return "checkpoint"
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    raise AdapterError(
        f"{path} is no adapter folder ({CONFIG}), no Lightning checkpoint (.ckpt) and no model ({SINGLE} or {INDEX})"
    )


def inspect(path: Path) -> dict[str, Any]:
    """Describe what is at ``path``. Everything in it that can be checked by itself is.

    Raises:
        AdapterError: If it is an adapter or a model, and damaged.
        CheckpointError: If it is a checkpoint, and damaged or not of adapters.
    """
    read = {"adapter": _adapter, "checkpoint": _checkpoint, "merged": _merged}[kind_of_path(path)]
    return {"path": str(path), **read(path)}


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter folder and check it, but for what only a model could tell.

    Raises:
        AdapterError: If it is damaged.
    """
    try:
        file = adapter_file.read(path)
        configs_of(file)
        return adapter_file.load(path, file)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def require_adapters_in(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise ``CheckpointError`` if a checkpoint lacks adapters that its description names."""
    state = checkpoint["state_dict"]
    absent = [
        key
        for layer in checkpoint[KEY].get("targets", ())
        for key in (f"{layer}.adapters.default.lora_A", f"{layer}.adapters.default.lora_B")
        if key not in state
    ]
    if absent:
        raise CheckpointError(f"{path} lacks {listing(absent)}")


def require_sound(files: BaseFiles) -> None:
    """Raise ``AdapterError`` if a tensor of a model's files is not finite."""
    broken = [
        name
        for name, outline in files.outline.items()
        if outline.is_floating_point() and outline.element_size() > 1 and not is_finite(files.read(name))
    ]
    if broken:
        raise AdapterError(f"{files.folder} holds NaN or infinity in {listing(broken)}")


def base_name(entry: Mapping[str, Any]) -> str | None:
    """The short name of the base that a description names."""
    saved = entry.get("base_fingerprint")
    try:
        return combined(map(Fingerprint.from_json, saved.values())) if isinstance(saved, dict) and saved else None
    except ValueError:
        return None


def _adapter(path: Path) -> dict[str, Any]:
    file = read_adapter(path)
    configs = configs_of(file)
    metadata = file.metadata or {}
    tensors = [*(t for leaves in file.adapters.values() for t in leaves.values()), *file.others.values()]
    return {
        "what": "adapter folder",
        "written_by": "lightning_lora" if file.metadata else "another program",
        "version": metadata.get("version"),
        "method": metadata.get("method", "lora"),
        **describe_loras(configs),
        "train": sorted(file.settings.get("modules_to_save") or []),
        "quantization": metadata.get("quantization"),
        "base": base_name(metadata),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "layers": [
            _layer(name, *factors(file.adapters[name]), SCALINGS[config.scaling](config.alpha, config.r))
            for name, config in sorted(configs.items())
        ],
        "readers": _readers(file),
    }


def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The matrices ``A`` and ``B`` among the tensors of one layer."""
    by_end = {leaf.removesuffix(".weight")[-1]: tensor for leaf, tensor in tensors.items() if "lora_" in leaf}
    return by_end["A"].flatten(1), by_end["B"].flatten(1)


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    require_adapters_in(checkpoint, path)
    entry, state = checkpoint[KEY], checkpoint["state_dict"]
    layers = []
    for name in entry["targets"]:
        a, b = (state[f"{name}.adapters.default.lora_{letter}"] for letter in "AB")
        alpha, r, scaling = (_of(entry[field], name) for field in ("alpha", "r", "scaling"))
        layers.append(_layer(name, a, b, SCALINGS[scaling](alpha, r)))
    return {
        "what": "Lightning checkpoint",
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        **{field: entry.get(field) for field in ("version", "method", "r", "alpha", "scaling", "targets", "train")},
        "quantization": entry.get("quantization"),
        "optimizers": entry.get("optimizers"),
        "base": base_name(entry),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "bytes": path.stat().st_size,
        "layers": layers,
        "readers": {
            "lightning_lora": "yes: ckpt_path=, load_from_checkpoint",
            "others": "no: lightning-lora convert makes an adapter folder of it",
        },
    }


def _merged(path: Path) -> dict[str, Any]:
    files = BaseFiles(path)
    metadata = _merged_metadata(path)
    outline = files.outline.values()
    return {
        "what": "merged model" if metadata.get("merged") else "model",
        "onto": metadata.get("onto"),
        "trained_on": metadata.get("trained_on"),
        "tensors": len(outline),
        "parameters": sum(tensor.numel() for tensor in outline),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in outline),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in outline}),
        "readers": {
            "load_state_dict": "yes",
            "transformers": "yes" if files.config else "no: config.json is missing",
        },
    }


def _merged_metadata(path: Path) -> dict[str, Any]:
    first = next(iter(sorted(path.glob("model*.safetensors"))))
    with safe_open(first, "pt") as file:
        text = (file.metadata() or {}).get(KEY, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _layer(name: str, a: Tensor, b: Tensor, scale: float) -> dict[str, Any]:
    """Norms of one layer. ``|B A|`` is that of two R x R matrices: ``|B A|^2 = tr(B^T B A A^T)``."""
    a, b = a.double(), b.double()
    update = scale * math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))
    return {"name": name, "r": len(a), "norm_A": float(a.norm()), "norm_B": float(b.norm()), "norm_update": update}


def _of(value: Any, layer: str) -> Any:
    return value[layer] if isinstance(value, dict) else value


def _readers(file: AdapterFile) -> dict[str, str]:
    """Which programs can load an adapter folder, and what keeps the others from it."""
    ranks = {config.r for config in configs_of(file).values()}
    obstacles = []
    if file.settings.get("modules_to_save"):
        obstacles.append("modules_to_save")
    if any("embedding" in leaf for leaves in file.adapters.values() for leaf in leaves):
        obstacles.append("an adapted embedding")
    if any(tensor.ndim > 2 for leaves in file.adapters.values() for tensor in leaves.values()):
        obstacles.append("an adapted convolution")
    vllm = obstacles + (["rank_pattern"] if len(ranks) > 1 else [])
    vllm += [f"r={r}" for r in sorted(ranks) if r not in _VLLM_RANKS and r > max(_VLLM_RANKS)]
    return {
        "lightning_lora": "yes",
        "PEFT, transformers": "yes",
        "vLLM": _verdict(vllm, f"yes, with max_lora_rank >= {max(ranks, default=1)}"),
        "llama.cpp": _verdict(obstacles, "yes, through convert_lora_to_gguf.py"),
    }


def _verdict(obstacles: list[str], yes: str) -> str:
    return f"no: {listing(obstacles)}; merge it and load the merged model" if obstacles else yes
