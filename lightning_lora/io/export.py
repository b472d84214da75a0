"""``export_merged``: the merged model on disk, one layer in memory at a time, the live model left as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_lora.errors import MergeError, listing
from lightning_lora.io.adapter_file import CONFIG
from lightning_lora.io.description import KEY, VERSION
from lightning_lora.io.dtypes import NAMES
from lightning_lora.io.keys import canonical
from lightning_lora.io.shards import Part, write_shards
from lightning_lora.model.biases import trained_biases
from lightning_lora.model.layers import adapter_names, require_adapters
from lightning_lora.model.merge import merged
from lightning_lora.model.parameters import trained_modules
from lightning_lora.model.split import Host, hosts
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, adopter_of, weight_dtype, weight_shape, with_weight
from lightning_lora.nn.split import Split

MODEL_CONFIG = "config.json"
_AT_ONCE = 2
"""Layers: while one is written, another is merged. More were no faster."""


@runtime_checkable
class WritesJson(Protocol):
    """A configuration as those of Hugging Face transformers are, without which their files do not load."""

    def to_json_string(self) -> str:
        """Return it as JSON."""


def export_merged(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write what :func:`merge` would make of ``model`` to a folder, without changing the model.

    The files are safetensors with the base model's own keys: ``model.safetensors``, or shards and
    ``model.safetensors.index.json``. Each layer is merged, checked, written and dropped, two of them at a time in
    threads of their own. So the extra memory is that of two layers, or of a few rows of each where rows merge alone. A
    tensor that the model has under several names is written under each. Beside the weights of a Hugging Face model its
    ``config.json`` is written, and ``from_pretrained`` loads the folder.

    Args:
        model: A model with adapters; its active ones are merged.
        path: The folder. Not that of an adapter: ``from_pretrained`` would load that on top, and add the update twice.
        max_shard_size: Bytes of a file at most, or such as ``"5GB"``.
        dtype: What to store floating-point tensors in; None keeps what :func:`merge` gives.

    Returns:
        The folder.

    Raises:
        AdapterError: If the model has no adapters.
        MergeError: If a merged weight is not finite, a layer that has no adapter is quantized, or the folder holds an
            adapter.
        OSError: If there is no room; what was in the folder before is untouched.
    """
    require_adapters(model)
    return write_model(model, Path(path), max_shard_size=max_shard_size, dtype=dtype)


@torch.no_grad()
def write_model(
    model: nn.Module, folder: Path, *, max_shard_size: int | str = "5GB", dtype: torch.dtype | None = None
) -> Path:
    """Do as :func:`export_merged`, also for a model without adapters, which is written as it is."""
    refuse_adapter_folder(folder)
    parts = list(_parts(model, dtype))
    config = getattr(model, "config", None)
    beside: dict[str, Callable[[Path], object]] = {}
    if isinstance(config, WritesJson):
        text = config_text(config, type(model).__name__, dtype)
        beside[MODEL_CONFIG] = lambda file: file.write_text(text)
    write_shards(
        folder,
        parts,
        max_shard_size=max_shard_size,
        metadata=merged_metadata(),
        beside=beside,
        at_once=_AT_ONCE,
    )
    return folder


def refuse_adapter_folder(folder: Path) -> None:
    """Raise ``MergeError`` if the folder holds an adapter."""
    if (folder / CONFIG).exists():
        raise MergeError(
            f"{folder} holds an adapter ({CONFIG}). transformers would load it on top of the merged weights and so add "
            f"the update twice. Choose another folder, such as {folder / 'merged'}"
        )


def merged_metadata(**more: Any) -> dict[str, str]:
    """What the header of a merged file says of it."""
    return {KEY: json.dumps({"version": VERSION, "merged": True, **more}, sort_keys=True)}


def _parts(model: nn.Module, dtype: torch.dtype | None) -> Iterator[Part]:
    found: set[nn.Module] = set(hosts(model).values())
    places = {name: module for name, module in model.named_modules(remove_duplicate=False) if module in found}
    _refuse_quantized(model, found)
    whole = tuple(f"{path}." for name in adapter_names(model) for path in trained_modules(model, name))
    whole += tuple(f"{path}.bias" for name in adapter_names(model) for path in trained_biases(model, name))
    written: set[str] = set()
    for key, value in model.state_dict().items():
        place = next((prefix for prefix in _prefixes(key) if prefix in places), None)
        if place is None:
            yield _copy(canonical(key), value, dtype, trained=key.startswith(whole))
        elif place not in written:
            written.add(place)
            host = places[place]
            assert isinstance(host, AdaptedLayer | Split | QuantizedLinear)
            yield Part(_named(place, _outline(host, dtype)), partial(_merged, place, host, dtype), computed=True)


def _copy(name: str, value: Any, dtype: torch.dtype | None, *, trained: bool) -> Part:
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided or value.dtype not in NAMES:
        raise MergeError(f"{name} is no dense tensor with values, and safetensors holds nothing else")
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    outline = torch.empty(value.shape, dtype=wanted, device="meta")
    return Part({name: outline}, lambda: [(name, value.detach().to(wanted))], computed=trained)


def _outline(host: Host, dtype: torch.dtype | None) -> nn.Module:
    """The plain layer that ``host`` will be, on the meta device."""
    if isinstance(host, Split):
        plain = {name: _outline_of(_base(layer), dtype) for name, layer in host.parts().items()}
        return host.joined(plain, dtype=dtype)
    return _outline_of(_base(host), dtype)


def _outline_of(base: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return with_weight(base, torch.empty(weight_shape(base), dtype=dtype or weight_dtype(base), device="meta"))


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdaptedLayer) else layer


def _merged(path: str, host: Host, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the plain layer, the weight of a single one a few rows at a time."""
    if isinstance(host, Split):
        yield from _named(path, merged(host, dtype=dtype)).items()
        return
    for name, tensor in _named(path, _outline(host, dtype)).items():
        if tensor.is_meta:
            pieces = host.merged_pieces if isinstance(host, AdaptedLayer) else host.pieces
            yield from ((name, piece) for piece in pieces(tensor.dtype))
        else:
            yield name, tensor


def _named(path: str, plain: nn.Module) -> dict[str, Tensor]:
    return {canonical(f"{path}.{key}"): tensor for key, tensor in plain.state_dict().items()}


def _refuse_quantized(model: nn.Module, hosts: set[nn.Module]) -> None:
    under = {_base(layer) for host in hosts for layer in (host, *host.children())}
    packed = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, QuantizedLinear) or adopter_of(module) is not None) and module not in under
    ]
    if packed:
        raise MergeError(f"{listing(packed)} is quantized and has no adapter, so it cannot be written as a plain layer")


def _prefixes(key: str) -> Iterator[str]:
    for index, letter in enumerate(key):
        if letter == ".":
            yield key[:index]


def config_text(config: WritesJson, architecture: str, dtype: torch.dtype | None = None) -> str:
    """A model's configuration as a file, of a model that is not quantized.

    Args:
        config: The configuration.
        architecture: The model's class, if the configuration does not name it.
        dtype: What the weights are stored in, where that is not what the configuration says.
    """
    settings = json.loads(config.to_json_string())
    settings.pop("quantization_config", None)  # the merged weights are plain
    if not settings.get("architectures"):
        settings["architectures"] = [architecture]
    if dtype is not None:
        settings["dtype"] = str(dtype).removeprefix("torch.")
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"
