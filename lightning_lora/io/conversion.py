"""From a Lightning checkpoint to an adapter folder and back, and from a pickled adapter to safetensors."""

from __future__ import annotations

import zipfile
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterError, CheckpointError, listing
from lightning_lora.io import adapter_file, peft
from lightning_lora.io.adapter_file import CONFIG
from lightning_lora.io.atomic import replacing
from lightning_lora.io.checkpoint_file import read_checkpoint, refused, seal
from lightning_lora.io.description import CHANCE, KEY, VERSION, Description, describe_configs
from lightning_lora.io.fitting import configs_of
from lightning_lora.io.inspection import adapter_in, of_layer, read_adapter, require_adapters_in, unpacked_alone
from lightning_lora.io.keys import PREFIX, adapter_key, by_parameter, leaves_over, trained_key
from lightning_lora.nn.dora import DoRAConfig
from lightning_lora.nn.linear import LinearKind
from lightning_lora.nn.lora import LoRA, LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.vera import VeRAConfig

_KINDS = {"linear": "linear", "transposed linear": "linear", "embedding": "embedding"}
_METHODS = {config.method: config for config in (LoRAConfig, DoRAConfig, LoRAFAConfig)}
_PICKLED = "adapter_model.bin"


def checkpoint_to_folder(path: Path, folder: Path, prefix: str | None = None) -> str:
    """Write the adapter of a Lightning checkpoint as an adapter folder.

    Args:
        path: A checkpoint written in a run with ``LoRACallback``.
        folder: Where to.
        prefix: What to take off the names, which in a checkpoint begin at the LightningModule and in a folder at the
            network in it, such as ``"net."``. None takes off the first part of the name if all have it in common.

    Returns:
        The prefix that was taken off.

    Raises:
        AdapterError: If the format has no such method, or has one for all layers where these have several.
        CheckpointError: If it is damaged, or holds what a folder cannot.
    """
    checkpoint = read_checkpoint(path)
    require_adapters_in(checkpoint, path)
    entry, state = checkpoint[KEY], checkpoint["state_dict"]
    biases = entry.get("biases", [])
    names = [*entry["targets"], *entry["train"], *biases]
    prefix = _common(names) if prefix is None else prefix
    strangers = [name for name in names if not name.startswith(prefix)]
    if strangers:
        raise CheckpointError(f"{listing(strangers)} does not begin with {prefix!r}; pass another --prefix")
    kinds = {name: of_layer(entry.get("kinds", "linear"), name) for name in entry["targets"]}
    _require_convertible(entry, kinds)
    short = {name: name.removeprefix(prefix) for name in names}
    plain = {name: _plain(entry, name, adapter_in(state, name)) for name in entry["targets"]}
    configs = {name: config for name, (config, _) in plain.items()}
    settings = peft.to_peft(
        {short[name]: config for name, config in configs.items()},
        names=[*short.values()],
        train=[short[name] for name in entry["train"]],
        bias=_choice(biases, entry["targets"]),
        transposed="transposed linear" in kinds.values(),
    )
    # The names of all other modules are not known here, so that a brief target could match too many.
    settings["target_modules"] = sorted(short[name] for name in entry["targets"])
    tensors = {
        adapter_key(short[name], leaf): plain[name][1][key]
        for name, kind in kinds.items()
        for key, leaf in leaves_over(_KINDS[kind], configs[name].method).items()
    }
    whole = (*(f"{name}." for name in entry["train"]), *_bias_keys(biases, entry["targets"]))
    tensors |= {trained_key(key.removeprefix(prefix)): tensor for key, tensor in state.items() if key.startswith(whole)}
    adapter_file.write(folder, tensors, settings, _metadata(entry, short, configs))
    return prefix


def folder_to_checkpoint(folder: Path, path: Path, prefix: str = "") -> None:
    """Write an adapter folder as a Lightning checkpoint, for ``load_from_checkpoint`` and ``ckpt_path=`` of a test.

    It holds weights alone: no optimizer state, from which a fit could be resumed.

    Raises:
        AdapterError: If the folder is damaged.
    """
    file = unpacked_alone(read_adapter(folder))
    metadata = file.metadata or {}
    configs = {f"{prefix}{name}": config for name, config in configs_of(file).items()}
    if any(isinstance(config, VeRAConfig) for config in configs.values()):
        raise AdapterError(
            f"{folder}: it holds VeRA, of which the sizes of the model's layers say which elements are a layer's own, "
            "so it cannot be converted without the model. Load it there: load_adapter(model, folder), or "
            "LoRACallback(adapter=folder)"
        )
    _require_on_original(folder, metadata)
    state: dict[str, Tensor] = {}
    for name, tensors in file.adapters.items():
        for key, tensor in by_parameter(tensors).items():
            state[f"{prefix}{name}.adapters.default.{key}"] = tensor.clone()
    state |= {f"{prefix}{key.removeprefix(PREFIX)}": tensor for key, tensor in file.others.items()}
    state |= dict(zip(_bias_keys([prefix + name for name in file.biases], configs), file.biases.values(), strict=True))
    entry: Description = {
        "version": VERSION,
        **describe_configs(configs),
        "train": sorted(prefix + name for name in file.settings.get("modules_to_save") or []),
        "biases": sorted(prefix + name for name in file.biases),
        "quantization": _renamed(metadata.get("quantization", "none"), prefix),
        "optimizers": [],
    }
    for field in ("kinds", "base_fingerprint"):
        if field in metadata:
            entry[field] = _renamed(metadata[field], prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.6", "state_dict": state, KEY: entry}
    seal(checkpoint)
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def unpickle(path: Path, folder: Path) -> None:
    """Write a pickled adapter by PEFT as safetensors. The pickle is read by torch's restricted reader: no code is run.

    Args:
        path: The folder, or ``adapter_model.bin`` in it.
        folder: Where to.

    Raises:
        AdapterError: If it holds anything but tensors, or its config is missing or damaged.
    """
    pickle = path / _PICKLED if path.is_dir() else path
    config = pickle.parent / CONFIG
    if not pickle.is_file() or not config.is_file():
        raise AdapterError(f"{pickle.parent}: {_PICKLED if not pickle.is_file() else CONFIG} is missing")
    _refuse_bomb(pickle)
    try:
        tensors = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, and none names the file
        raise AdapterError(
            f"{pickle} is damaged, or holds what is no tensor and is not read ({refused(error)})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, Tensor) and isinstance(k, str) for k, t in tensors.items()
    ):
        raise AdapterError(f"{pickle} holds something else than tensors by name")
    settings = peft.parse(config.read_bytes())
    adapter_file.write_foreign(folder, tensors, settings)


def _metadata(
    entry: Mapping[str, Any], short: Mapping[str, str], configs: Mapping[str, LowRankConfig]
) -> dict[str, Any]:
    kept = {
        "version": VERSION,
        **describe_configs({short[name]: config for name, config in configs.items()}),
        "dropout": 0.0,
        "train": [short[name] for name in entry["train"]],
        "biases": [short[name] for name in entry.get("biases", [])],
    }
    for field in ("kinds", "start", "quantization", "base_fingerprint"):
        value = entry.get(field)
        kept[field] = {short[name]: each for name, each in value.items()} if isinstance(value, dict) else value
    return {field: value for field, value in kept.items() if value is not None}


def _common(names: list[str]) -> str:
    firsts = {name.partition(".")[0] for name in names}
    return f"{firsts.pop()}." if len(firsts) == 1 and all("." in name for name in names) else ""


def _renamed(value: Any, prefix: str) -> Any:
    return {f"{prefix}{name}": each for name, each in value.items()} if isinstance(value, dict) else value


def _require_convertible(entry: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Refuse what a folder holds in another form, which depends on the model."""
    methods = {name: of_layer(entry["method"], name) for name in kinds}
    peft.check_one_method(methods)
    odd = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _KINDS]
    odd += [f"{name} (method {method!r})" for name, method in methods.items() if method not in _METHODS]
    if odd:
        raise CheckpointError(
            f"{listing(odd)} cannot be converted without the model. Use load_from_checkpoint(...) and save_adapter(...)"
        )


def _choice(biases: Sequence[str], adapted: Iterable[str]) -> str:
    """Which biases were trained, from those that were: they are all, or all of adapted layers."""
    return "none" if not biases else "adapted" if set(biases) <= set(adapted) else "all"


def _bias_keys(biases: Iterable[str], adapted: Container[str]) -> list[str]:
    """Names of biases in a checkpoint."""
    return [f"{name}.base_layer.bias" if name in adapted else f"{name}.bias" for name in biases]


def _require_on_original(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse an adapter that was trained over a base which can not be made again."""
    start, stored = metadata.get("start", CHANCE), metadata.get("quantization", "none")
    if start != CHANCE and stored != "none":
        raise AdapterError(
            f"{folder}: it started in the base weight ({start}), and that was quantized without the start, which a "
            "folder does not hold. Keep the checkpoint it was trained into"
        )


def _plain(
    entry: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> tuple[LowRankConfig, Mapping[str, Tensor]]:
    """One layer's adapter as a folder has it: a plain LoRA over the original base, also where it started in that."""
    start = of_layer(entry.get("start", CHANCE), name)
    given = {field: of_layer(entry[field], name) for field in ("r", "alpha", "scaling")}
    lora_A, lora_B = tensors["lora_A"], tensors["lora_B"]
    if "lora_A0" not in tensors:
        return _METHODS[of_layer(entry["method"], name)](**given), tensors
    config = LoRAConfig(**given, init=start)
    adapter = LoRA(config, LinearKind(lora_A.shape[1], lora_B.shape[0]), device=lora_A.device, dtype=lora_A.dtype)
    adapter.load_state_dict({key: tensors[key] for key in ("lora_A", "lora_B", "lora_A0", "lora_B0")})
    plain = adapter.plain()
    return plain.config, {"lora_A": plain.lora_A.detach(), "lora_B": plain.lora_B.detach()}


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that is larger unpacked than packed: torch stores tensors as they are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise AdapterError(f"{path} is compressed, as no file by torch is ({unpacked:,} bytes unpacked); not read")
