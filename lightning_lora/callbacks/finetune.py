"""The state of one module's fine-tune: adapted, or merged with the adapted layers kept aside so that it can go on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.description import Description, describe, differences
from lightning_lora.model.layers import adapted_layers, replace
from lightning_lora.model.merge import check_mergeable, merged
from lightning_lora.model.parameters import adapter_state_keys
from lightning_lora.nn.linear import LoRALinear

KEY = "lightning_lora"
"""The checkpoint entry that says what adapter the checkpoint holds."""


class FineTune:
    """What the callback knows of one module it has adapted.

    Merging takes the adapted layers out of the module and keeps them here. They are what a checkpoint holds and what a
    later run goes on with, and putting them back gives the very model that was trained, bit for bit.

    Args:
        module: A module with adapters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers: dict[str, LoRALinear] = adapted_layers(module)
        self.description: Description = describe(module)
        self._keys = adapter_state_keys(module)
        self._merged: dict[LoRALinear, nn.Linear] = {}

    @property
    def is_merged(self) -> bool:
        """Whether the module holds plain layers now."""
        return bool(self._merged)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Put plain layers in place of the adapted ones, which move to the CPU; all or nothing.

        Raises:
            MergeError: If a weight is not finite; the module is left as it is.
        """
        check_mergeable(self.layers)
        plain = {layer: merged(layer) for layer in self.layers.values()}
        replace(module, plain)
        self._merged = plain
        for layer in plain:
            layer.to("cpu")

    def unmerge(self, module: nn.Module) -> None:
        """Put the adapted layers back."""
        for layer, plain in self._merged.items():
            layer.to(plain.weight.device).train(plain.training)
        replace(module, {plain: layer for layer, plain in self._merged.items()})
        self._merged = {}

    def reduce_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave in a checkpoint's ``state_dict`` what the fine-tune changes, and say under :data:`KEY` what that is."""
        if KEY in checkpoint:
            return
        kept = {
            f"{path}.{key}": tensor for path, layer in self.layers.items() for key, tensor in layer.state_dict().items()
        }
        available = {**checkpoint["state_dict"], **kept} if self.is_merged else checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: available[key] for key in self._keys}
        checkpoint[KEY] = self.description

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
                "module first "
                "(load_from_checkpoint, or load_state_dict) and pass no ckpt_path"
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
