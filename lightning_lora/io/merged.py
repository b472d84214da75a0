"""Merged weights on disk: a safetensors file with the base model's own names."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from lightning_lora.errors import MergeError, listing
from lightning_lora.io.atomic import replacing
from lightning_lora.io.keys import canonical
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import QuantizedLinear

MERGED = "model.safetensors"


def save_merged(model: nn.Module, folder: str | PathLike[str]) -> Path:
    """Write a merged model's state dict to ``folder/model.safetensors`` and return that path; complete or absent.

    Tensors that share memory are written once for each name, so that a plain ``load_state_dict`` finds them all.

    Raises:
        MergeError: If the model is not merged yet or still holds quantized layers.
        OSError: If the file cannot be written; one that was there before is untouched.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if packed or adapted_layers(model):
        raise MergeError(f"{listing(packed or adapted_layers(model))} is not merged; call merge(model) first")
    path = Path(folder) / MERGED
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[canonical(name)] = tensor.clone().contiguous() if shared else tensor.contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return path
