"""The updates that an adapter on disk stands for, read without the model: from its folder, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import adapter_file, peft
from lightning_lora.io.attention import update_of_part
from lightning_lora.io.description import KEY
from lightning_lora.io.inspection import of_layer
from lightning_lora.metrics.spectrum import Factors
from lightning_lora.nn.low_rank import SCALINGS

_LOW_RANK = ("lora", "lora_fa")
_INFIX = ".adapters.default."


def read_adapter(path: Path) -> dict[str, Factors]:
    """Return ``A`` and ``s B`` of each adapted layer, as matrices, in the file's order.

    Args:
        path: An adapter folder, ours or PEFT's, or a ``.ckpt`` that was written in a run with ``LoRACallback``.

    Raises:
        AdapterError: If it is neither, damaged, or of a method whose update is no product of two factors.
    """
    try:
        if path.suffix == ".ckpt" and path.is_file():
            return _from_checkpoint(path)
        if path.is_dir() and not (path / adapter_file.CONFIG).is_file():
            raise AdapterError(f"holds no adapter: expected a folder with {adapter_file.CONFIG}, or a .ckpt")
        return _from_folder(path)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def _from_folder(path: Path) -> dict[str, Factors]:
    file = adapter_file.load(path, adapter_file.read(path))
    found = {}
    for layer, leaves in sorted(file.adapters.items(), key=lambda item: _natural(item[0])):
        name, place, times = update_of_part(layer)
        config = peft.from_peft(file.settings, [place])[place]
        lora_A, lora_B = (next(t for leaf, t in leaves.items() if which in leaf) for which in ("_A", "_B"))
        found[name] = lora_A.flatten(1), times * config.scale * lora_B.flatten(1)
    return found


def _from_checkpoint(path: Path) -> dict[str, Factors]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if KEY not in checkpoint or "method" not in checkpoint[KEY]:
        raise AdapterError("was not written by LoRACallback, so it holds no adapter")
    description, state = checkpoint[KEY], checkpoint["state_dict"]
    methods = {layer: of_layer(description["method"], layer) for layer in description["targets"]}
    others = sorted(set(methods.values()) - set(_LOW_RANK))
    if others:
        raise AdapterError(f"holds {listing(others)}, whose updates cannot be drawn without the model; lora can be")
    return {layer: _factors(description, layer, state) for layer in sorted(methods, key=_natural)}


def _factors(description: dict[str, Any], layer: str, state: dict[str, Tensor]) -> Factors:
    tensors = {key: state[f"{layer}{_INFIX}{key}"] for key in ("lora_A", "lora_B")}
    lora_A, lora_B = tensors["lora_A"].float(), tensors["lora_B"].float()
    scale = SCALINGS[of_layer(description["scaling"], layer)](
        *(of_layer(description[key], layer) for key in ("alpha", "r"))
    )
    start_A, start_B = (state.get(f"{layer}{_INFIX}{key}") for key in ("lora_A0", "lora_B0"))
    if start_A is not None and start_B is not None:  # the change since the start: B A - B0 A0
        lora_A, lora_B = torch.cat([lora_A - start_A, start_A]), torch.cat([lora_B, lora_B - start_B], dim=1)
    return lora_A, scale * lora_B


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort ``layers.10`` behind ``layers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
