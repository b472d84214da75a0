"""The state of one module's fine-tune: adapted, or merged with the adapted layers kept aside so that it can go on."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.description import Description, describe, differences
from lightning_lora.io.keys import canonical
from lightning_lora.model.layers import adapted_layers, replace
from lightning_lora.model.merge import check_mergeable, merged
from lightning_lora.model.parameters import adapter_state_keys, trained_outside_adapters
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.optim.report import class_name

KEY = "lightning_lora"
"""The checkpoint entry that says what adapter the checkpoint holds."""


class FineTune:
    """What the callback knows of one module it has adapted.

    Merging takes the adapted layers out of the module and keeps them here. They are what a checkpoint holds and what a
    later run goes on with, and putting them back gives the very model that was trained, bit for bit.

    Args:
        module: A module with adapters.
        adapter: The folder they were loaded from, if any.
    """

    def __init__(self, module: nn.Module, adapter: str | PathLike[str] | None = None) -> None:
        self.adapter = adapter
        self.layers: dict[str, LoRALinear] = adapted_layers(module)
        self.description: Description = describe(module)
        self.trained = trained_outside_adapters(module)
        self._keys = adapter_state_keys(module)
        self._merged: dict[LoRALinear, nn.Linear] = {}
        self._sums: dict[LoRALinear, int] = {}

    @property
    def configs(self) -> dict[str, LoRAConfig]:
        """The config of each adapted layer."""
        configs = {canonical(path): layer.adapter("default").config for path, layer in self.layers.items()}
        return {path: config for path, config in configs.items() if isinstance(config, LoRAConfig)}

    @property
    def dense(self) -> set[str]:
        """Names of the adapted layers whose base is not quantized."""
        return {path for path, layer in self.layers.items() if isinstance(layer.base_layer, nn.Linear)}

    @property
    def is_merged(self) -> bool:
        """Whether the module holds plain layers now."""
        return bool(self._merged)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Put plain layers in place of the adapted ones, which move to the CPU one by one; all or nothing.

        Raises:
            MergeError: If a weight is not finite; the module is left as it is.
        """
        check_mergeable(self.layers)
        plain: dict[LoRALinear, nn.Linear] = {}
        try:
            for layer in self.layers.values():
                plain[layer] = merged(layer)
                layer.to("cpu")
        except BaseException:
            for layer, linear in plain.items():
                layer.to(linear.weight.device)
            raise
        replace(module, plain)
        self._merged = plain
        self._sums = {layer: _bit_sum(linear.weight) for layer, linear in plain.items()}

    def is_merged_in(self, module: nn.Module) -> bool:
        """Whether ``module`` holds the merged layers as they were made: not rebuilt, reloaded or trained since."""
        here = set(module.modules())
        return self.is_merged and all(
            plain in here and _bit_sum(plain.weight) == self._sums[layer] for layer, plain in self._merged.items()
        )

    def unmerge(self, module: nn.Module) -> None:
        """Put the adapted layers back."""
        for layer, plain in self._merged.items():
            layer.to(plain.weight.device).train(plain.training)
        replace(module, {plain: layer for layer, plain in self._merged.items()})
        self._merged = {}

    def reduce_checkpoint(self, checkpoint: dict[str, Any], optimizers: Sequence[Optimizer] = ()) -> None:
        """Leave in a checkpoint's ``state_dict`` what the fine-tune changes, and say under :data:`KEY` what that is."""
        if KEY in checkpoint:
            return
        kept = {
            f"{path}.{key}": tensor for path, layer in self.layers.items() for key, tensor in layer.state_dict().items()
        }
        available = {**checkpoint["state_dict"], **kept} if self.is_merged else checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: available[key] for key in self._keys}
        checkpoint[KEY] = self.description | {"optimizers": [class_name(optimizer) for optimizer in optimizers]}

    def complete_checkpoint(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this fine-tune, and add the frozen weights it leaves out.

        They come from ``module`` itself. Lightning can then load it strictly: nothing of ours may be missing, and
        nothing foreign is let in.

        Raises:
            CheckpointError: If it holds no adapter, or another one; the message names both sides.
        """
        if KEY not in checkpoint:
            raise CheckpointError(
                "this checkpoint was not written by LoRACallback. To fine-tune a full checkpoint, load it into the "
                "module first (load_from_checkpoint, or load_state_dict) and pass no ckpt_path"
            )
        apart = differences(checkpoint[KEY], self.description)
        if apart:
            raise CheckpointError(
                f"this checkpoint belongs to another fine-tune: {'; '.join(apart)}. Set the callback to the same values"
            )
        saved: dict[str, Tensor] = checkpoint["state_dict"]
        missing, extra = [k for k in self._keys if k not in saved], [k for k in saved if k not in self._keys]
        if missing or extra:
            raise CheckpointError(
                f"this checkpoint lacks {listing(missing) or 'nothing'} and has beyond its adapter "
                f"{listing(extra) or 'nothing'}"
            )
        checkpoint["state_dict"] = {**module.state_dict(), **saved}


def check_optimizers(checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Check that a checkpoint's optimizer states are of the optimizers they are loaded into.

    Raises:
        CheckpointError: If not; torch would find out at the first step, by a missing key.
    """
    here = [class_name(optimizer) for optimizer in optimizers]
    saved = checkpoint[KEY]["optimizers"]
    if saved != here:
        raise CheckpointError(
            f"this checkpoint holds the state of {listing(saved) or 'no optimizer'}, this run uses {listing(here)}. "
            "Set the callback's optimizer= and configure_optimizers as they were"
        )


def _bit_sum(weight: Tensor) -> int:
    """A checksum that no order of summation and no device changes."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().view(bits).sum(dtype=torch.int64))
