"""Base models on disk as others write them, and what the parts of this package that load nothing make of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, quantize
from lightning_lora.io.fingerprint import base_fingerprint
from lightning_lora.model.layers import adapted_layers


def written(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """Write tensors as ``save_pretrained`` lays them out."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    where = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def load_then_quantize(model: nn.Module, targets="all-linear", config=None, **settings) -> nn.Module:
    """The same base the long way: dense, adapted, quantized."""
    inject(model, targets, LoRAConfig(r=1), **settings)
    return model if config is None else quantize(model, config)


def assert_same_base(found: nn.Module, expected: nn.Module) -> None:
    """The same tensors of the same dtypes under the same names, and the same fingerprints; adapters apart."""
    ours, theirs = _base(found), _base(expected)
    assert ours.keys() == theirs.keys()
    unequal = [name for name in ours if not same_bits(ours[name], theirs[name])]
    assert unequal == []
    assert base_fingerprint(adapted_layers(found)) == base_fingerprint(adapted_layers(expected))
    assert [module.training for module in found.modules()] == [module.training for module in expected.modules()]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def untouched(model: nn.Module) -> bool:
    """Whether a model is as it was built on the meta device."""
    return all(parameter.is_meta for parameter in model.parameters())


def _base(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if ".adapters." not in name}
