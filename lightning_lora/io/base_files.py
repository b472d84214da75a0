"""A base model as the safetensors files in a folder, read a tensor at a time, without the classes that built it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io.description import KEY
from lightning_lora.io.dtypes import DTYPES
from lightning_lora.io.shards import MODEL, QUANTIZED, Naming
from lightning_lora.nn.attention import PROJECTIONS

MODEL_CONFIG = "config.json"
_MAX_JSON = 100 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PACKED = PROJECTIONS[:3]


@dataclass(frozen=True)
class Place:
    """Where in the files a layer's tensors are: of their own, or a third of what ``nn.MultiheadAttention`` packs.

    Attributes:
        weight: Name of the tensor.
        bias: Name of the bias, which need not be there.
        rows: Which rows of both.
    """

    weight: str
    bias: str
    rows: slice


class BaseFiles:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists.

    Args:
        folder: Where they are; or one safetensors file.
        naming: What the files are called.

    Attributes:
        outline: A meta tensor for each tensor, by name.

    Raises:
        AdapterError: If there are none, or an index names files that are missing or elsewhere.
    """

    def __init__(self, folder: Path, naming: Naming = MODEL) -> None:
        self.folder = folder if folder.is_dir() else folder.parent
        self._files: dict[str, Path] = {}
        self.outline: dict[str, Tensor] = {}
        for path in _files(folder, naming):
            try:
                with safe_open(path, "pt") as file:
                    found = {key: _outline(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise AdapterError(f"{path} is truncated or no safetensors file ({error})") from None
            self.outline |= found
            self._files |= dict.fromkeys(found, path)
        if not self.outline:
            raise AdapterError(f"{folder} holds no tensors")

    @property
    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(set(self._files.values()))

    def read(self, name: str) -> Tensor:
        """Return a tensor; its file is opened anew, because what has been read of a map stays in memory."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @property
    def said(self) -> dict[str, Any]:
        """What this package has written into the header of the first file, if anything."""
        with safe_open(self.paths[0], "pt") as file:
            text = (file.metadata() or {}).get(KEY, "{}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of a Hugging Face model, or nothing."""
        path = self.folder / MODEL_CONFIG
        return _json(path) if path.is_file() else {}

    def place(self, path: str) -> Place:
        """Return where the layer at ``path`` is."""
        name = path.rpartition(".")[2]
        packed = f"{path.removesuffix(name)}in_proj_weight"
        if name not in _PACKED or f"{path}.weight" in self.outline or packed not in self.outline:
            return Place(f"{path}.weight", f"{path}.bias", slice(None))
        first, size = _PACKED.index(name), self.outline[packed].shape[0] // len(_PACKED)
        return Place(packed, f"{packed.removesuffix('weight')}bias", slice(first * size, (first + 1) * size))

    def skeleton(self, layers: Mapping[str, Mapping[str, Tensor]], *, transposed: Container[str]) -> nn.Module:
        """Return modules of these names and shapes, on the meta device: what an adapter is compared with.

        Every matrix stands in a linear layer, as most do; under an adapter's tensors their names say what it is.

        Args:
            layers: The adapter's tensors by layer.
            transposed: Which of them store their weight transposed.
        """
        root: nn.Module = BaseModel()
        for name in self.outline:
            path, _, leaf = name.rpartition(".")
            try:
                _put_tensor(_container(root, path), leaf, self.outline[name])
            except (KeyError, TypeError, AttributeError) as error:
                raise AdapterError(
                    f"{self.folder} holds {name!r}, which cannot be the name of a tensor ({error})"
                ) from None
        for name, tensor in self.outline.items():
            path, _, leaf = name.rpartition(".")
            if path and leaf == "weight" and tensor.ndim in (2, 3, 4, 5):
                bias = self.outline.get(f"{path}.bias")
                _put(root, path, layer_for(tensor, layers.get(path, {}), bias, path in transposed))
        for path in filter(self._is_attention, layers):
            parent, _, child = path.rpartition(".")
            root.get_submodule(parent).add_module(child, self._attention(path))
        return root

    def layer(self, path: str, tensors: Mapping[str, Tensor], *, transposed: bool) -> nn.Module:
        """Return a layer with its weight; the linear layer it stands for where it is stored transposed."""
        place = self.place(path)
        bias = self.read(place.bias)[place.rows] if place.bias in self.outline else None
        return layer_for(self.read(place.weight)[place.rows], tensors, bias, transposed)

    def _is_attention(self, path: str) -> bool:
        packed, out = self.outline.get(f"{path}.in_proj_weight"), self.outline.get(f"{path}.out_proj.weight")
        return packed is not None and out is not None and packed.shape == (3 * out.shape[0], out.shape[0])

    def _attention(self, path: str) -> nn.Module:
        has = {name: f"{path}.{name}" in self.outline for name in ("in_proj_bias", "bias_k")}
        width = self.outline[f"{path}.out_proj.weight"].shape[0]
        return nn.MultiheadAttention(
            width, 1, bias=has["in_proj_bias"], add_bias_kv=has["bias_k"], device=torch.device("meta")
        )


class BaseModel(nn.Module):
    """A module that holds others, under the names they have in the files."""


def layer_for(weight: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, transposed: bool) -> nn.Module:
    """Return the layer with such a weight that tensors of an adapter of these names belong to."""
    layer: nn.Module
    if any("embedding" in leaf for leaf in tensors):
        layer = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif weight.ndim > 2:
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")
    else:
        weight = weight.t().contiguous() if transposed else weight
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return layer


def _files(folder: Path, naming: Naming) -> Iterator[Path]:
    if folder.is_file():
        if folder.suffix != ".safetensors":
            raise AdapterError(f"{folder} is no safetensors file; pass the base model's folder")
        yield folder
        return
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    if (folder / naming.single).is_file():
        yield folder / naming.single
        return
    path = folder / naming.index
    if not path.is_file():
        raise AdapterError(f"{folder} holds neither {naming.single} nor {naming.index}{_instead(folder, naming)}")
    names = _json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise AdapterError(f"{path} has no weight_map")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise AdapterError(f"{path} names {name!r}, which is no safetensors file in that folder")
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} is missing, and {naming.index} names it")
        yield folder / name


def _instead(folder: Path, naming: Naming) -> str:
    """What a folder without a model holds that may have been meant for one, and what to do."""
    if naming == QUANTIZED:
        return ": no base that save_quantized has written. load_base(model, ...) quantizes a dense one"
    if QUANTIZED.is_in(folder):
        return f"; {QUANTIZED.stem} files are a base in few bits, which load_quantized(model, ...) reads"
    pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
    why = f"; {listing(pickles)} is a pickle, which is not read" if pickles else ""
    return f"{why}. Save the base with safetensors"


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise AdapterError(f"{path} is larger than any index or config")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _outline(part: Any) -> Tensor:
    name = part.get_dtype()
    if name not in DTYPES:
        raise AdapterError(f"tensors of dtype {name} cannot be read")
    return torch.empty(part.get_shape(), dtype=DTYPES[name], device="meta")


def _container(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, BaseModel())
        module = module.get_submodule(name)
    return module


def _put_tensor(module: nn.Module, leaf: str, outline: Tensor) -> None:
    """A bias is a parameter, also where the layer it belongs to is not known: biases may be trained."""
    if leaf == "bias" and outline.ndim == 1 and outline.is_floating_point():
        module.register_parameter(leaf, nn.Parameter(outline, requires_grad=False))
    else:
        module.register_buffer(leaf, outline)


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer in a container's place, with what the container holds beside weight and bias."""
    parent, _, child = path.rpartition(".")
    old = root.get_submodule(path)
    for name, module in old.named_children():
        layer.add_module(name, module)
    for name, buffer in old.named_buffers(recurse=False):
        if name not in ("weight", "bias"):
            layer.register_buffer(name, buffer)
    root.get_submodule(parent).add_module(child, layer)
