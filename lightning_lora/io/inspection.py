"""What is in a file or folder of ours, as plain data: an adapter folder, a Lightning checkpoint, a merged model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterError, CheckpointError, listing
from lightning_lora.io import adapter_file, attention, readers, vera
from lightning_lora.io.adapter_file import CONFIG, AdapterFile
from lightning_lora.io.base_files import BaseFiles
from lightning_lora.io.biases import separated_alone
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.description import KEY, describe_configs
from lightning_lora.io.experts import refuse_stacks
from lightning_lora.io.fingerprint import base_name, to_json
from lightning_lora.io.fitting import configs_of
from lightning_lora.io.keys import adapter_key, by_parameter
from lightning_lora.io.quantized_header import read_header
from lightning_lora.io.shards import MODEL, QUANTIZED
from lightning_lora.model.merge import is_finite
from lightning_lora.nn.low_rank import SCALINGS, LowRankConfig

_FACTORS = ("lora_A", "lora_B")
_NEEDED = {
    "lora": _FACTORS,
    "lora_fa": _FACTORS,
    "dora": (*_FACTORS, "lora_magnitude_vector"),
    "vera": ("vera_lambda_d", "vera_lambda_b"),
}
_ADDED = ("lora", "lora_fa")  # the weight changes by s B A, whatever the base is and the seed was
_ONCE_IT = {
    readers.VLLM: f"yes; above rank {readers.VLLM_RANK} with --max-lora-rank",
    readers.LLAMA_CPP: "yes, through convert_lora_to_gguf.py",
}
_NOT_SHOWN = ("base_fingerprint", "sha256", "processes")


def kind_of_path(path: Path) -> str:
    """Return ``"adapter"``, ``"checkpoint"``, ``"merged"`` or ``"quantized"``.

    Raises:
        AdapterError: If it is none of these.
    """
    if (path / CONFIG).is_file() or (path / adapter_file.WEIGHTS).is_file():
        return "adapter"
    if MODEL.is_in(path):
        return "merged"
    if QUANTIZED.is_in(path):
        return "quantized"
    if path.is_file() and path.suffix == ".ckpt":
        return "checkpoint"
    if not path.exists():
        raise AdapterError(f"{path}: no such file or folder")
    raise AdapterError(
        f"{path} is no adapter folder ({CONFIG}), no Lightning checkpoint (.ckpt) and no model ({MODEL.single} or "
        f"{MODEL.index}, in few bits {QUANTIZED.single} or {QUANTIZED.index})"
    )


def inspect(path: Path) -> dict[str, Any]:
    """Describe what is at ``path``. Everything in it that can be checked by itself is.

    Raises:
        AdapterError: If it is an adapter or a model, and damaged.
        CheckpointError: If it is a checkpoint, and damaged or not of adapters.
    """
    read = {"adapter": _adapter, "checkpoint": _checkpoint, "merged": _merged, "quantized": _quantized}[
        kind_of_path(path)
    ]
    return {"path": str(path), **read(path)}


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter folder and check it, but for what only a model could tell.

    Raises:
        AdapterError: If it is damaged.
    """
    try:
        file = adapter_file.read(path)
        _require_complete(unpacked_alone(file))
        loaded = adapter_file.load(path, file)
        unpacked_alone(loaded)
        return loaded
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def unpacked_alone(file: AdapterFile) -> AdapterFile:
    """Return a file as it was read with what is in it as it is here, as far as that can be told without the model.

    Raises:
        AdapterError: If it contradicts itself.
    """
    refuse_stacks(file)
    return separated_alone(vera.unpacked_alone(attention.unpacked_alone(file)))


def _require_complete(file: AdapterFile) -> None:
    lacking = [
        f"{name}.{needed}"
        for name, config in configs_of(file).items()
        for needed in _NEEDED[config.method]
        if needed not in by_parameter(file.adapters[name])
    ]
    if lacking:
        raise AdapterError(f"{adapter_file.WEIGHTS} lacks {listing(lacking)}")


def require_adapters_in(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise ``CheckpointError`` if a checkpoint lacks adapters that its description names."""
    entry, state = checkpoint[KEY], checkpoint["state_dict"]
    absent = []
    for layer in entry.get("targets", ()):
        needed = _NEEDED.get(str(of_layer(entry["method"], layer)), ())
        found = adapter_in(state, layer)
        absent += [f"{layer}.adapters.default.{name}" for name in needed if name not in found]
        absent += [] if found else [f"{layer}.adapters.default"]
    if absent:
        raise CheckpointError(f"{path} lacks {listing(absent)}")


def adapter_in(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The tensors of one layer's adapter in a checkpoint, by their names in it."""
    prefix = f"{layer}.adapters.default."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def of_layer(value: Any, layer: str) -> Any:
    """What a field of a description says of one layer: it holds one value where all layers agree."""
    return value[layer] if isinstance(value, dict) else value


def require_sound(files: BaseFiles) -> None:
    """Raise ``AdapterError`` if a tensor of a model's files is not finite."""
    broken = [
        name
        for name, outline in files.outline.items()
        if outline.is_floating_point() and outline.element_size() > 1 and not is_finite(files.read(name))
    ]
    if broken:
        raise AdapterError(f"{files.folder} holds NaN or infinity in {listing(broken)}")


def _adapter(path: Path) -> dict[str, Any]:
    file = read_adapter(path)
    everything = _on_disk(file)
    readable, file = _readers(file.settings, everything), unpacked_alone(file)
    drawn = set(vera.PROJECTIONS.values())
    tensors = [tensor for key, tensor in everything.items() if key not in drawn]
    configs = configs_of(file)
    metadata = file.metadata or {}
    return {
        "what": "adapter folder",
        "written_by": "lightning_lora" if file.metadata else "another program",
        "version": metadata.get("version"),
        **describe_configs(configs),
        "start": metadata.get("start"),
        "train": sorted(file.settings.get("modules_to_save") or []),
        "biases": sorted(file.biases),
        "quantization": metadata.get("quantization"),
        "base": base_name(metadata),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in everything.values()),
        "layers": [
            _layer(
                name,
                by_parameter(file.adapters[name]),
                config.method,
                config.scale if isinstance(config, LowRankConfig) else 1.0,
            )
            for name, config in sorted(configs.items())
        ],
        "readers": readable,
    }


def _on_disk(file: AdapterFile) -> dict[str, Tensor]:
    adapters = {adapter_key(path, leaf): t for path, leaves in file.adapters.items() for leaf, t in leaves.items()}
    return adapters | dict(file.others)


def _checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    require_adapters_in(checkpoint, path)
    entry, state = checkpoint[KEY], checkpoint["state_dict"]
    layers = [
        _layer(name, adapter_in(state, name), of_layer(entry["method"], name), _scale(entry, name))
        for name in entry["targets"]
    ]
    return {
        "what": "Lightning checkpoint",
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        **{field: value for field, value in entry.items() if field not in _NOT_SHOWN},
        "base": base_name(entry),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "bytes": path.stat().st_size,
        "layers": layers,
        "readers": {
            "lightning_lora": "yes: ckpt_path=, load_from_checkpoint",
            "others": "no: lightning-lora convert makes an adapter folder of it, or says what does",
        },
    }


def _merged(path: Path) -> dict[str, Any]:
    files = BaseFiles(path)
    metadata = files.said
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


def _quantized(path: Path) -> dict[str, Any]:
    files = BaseFiles(path, QUANTIZED)
    header = read_header(files)
    outline = files.outline.values()
    stored = Counter(layer.storage for layer in header.layers.values())
    return {
        "what": "quantized base",
        "version": files.said["version"],
        "quantization": listing(f"{storage} ({count} layers)" for storage, count in sorted(stored.items())),
        "base": base_name({"base_fingerprint": to_json(header.base_fingerprint)}),
        "tensors": len(outline),
        "bytes": sum(tensor.nbytes for tensor in outline),
        "readers": {
            "lightning_lora": "yes: load_quantized",
            "others": "no: give them the dense base, or a merged model",
        },
    }


def _layer(name: str, tensors: Mapping[str, Tensor], method: str, scale: float) -> dict[str, Any]:
    """Norms of one layer's tensors, and of its update where that does not depend on more than they say."""
    norms = {
        f"norm_{key.removeprefix('lora_')}": float(t.double().norm())
        for key, t in tensors.items()
        if t.is_floating_point()
    }
    update = _norm_of_update(tensors, scale) if method in _ADDED else None
    return {"name": name, **norms, "norm_update": update}


def _norm_of_update(tensors: Mapping[str, Tensor], scale: float) -> float:
    """``|s B A|``, from two R x R matrices: ``|B A|^2 = tr(B^T B A A^T)``; with a start, of ``B A - B0 A0``."""
    a, b = (tensors[name].double() for name in _FACTORS)
    if "lora_A0" in tensors:
        a0, b0 = tensors["lora_A0"].double(), tensors["lora_B0"].double()
        a, b = torch.cat([a - a0, a0]), torch.cat([b, b - b0], dim=1)
    return scale * math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))


def _scale(entry: Mapping[str, Any], layer: str) -> float:
    """The factor before the update; 1 for a method that has none."""
    if not all(field in entry for field in ("alpha", "r", "scaling")):
        return 1.0
    alpha, r, scaling = (of_layer(entry[field], layer) for field in ("alpha", "r", "scaling"))
    return SCALINGS[scaling](alpha, r)


def _readers(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which programs can load an adapter folder, and what keeps the others from it."""
    served = {
        reader: f"no: {listing(cannot)}; merge it and load the merged model" if cannot else _ONCE_IT[reader]
        for reader, cannot in readers.obstacles(settings, tensors).items()
    }
    return {"lightning_lora": "yes", "PEFT, transformers": "yes", **served}
