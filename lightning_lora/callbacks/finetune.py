"""The state of one module's fine-tune: adapted, or merged with the adapted layers kept aside so that it can go on."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cached_property
from os import PathLike
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.io.description import Description, describe
from lightning_lora.io.fingerprint import Saved, base_fingerprint, to_json
from lightning_lora.io.keys import canonical
from lightning_lora.model.attention import Host, hosts
from lightning_lora.model.checksum import bit_sum
from lightning_lora.model.layers import adapted_layers, replace
from lightning_lora.model.merge import check_mergeable, merged
from lightning_lora.model.parameters import adapter_state_keys, trained_outside_adapters
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import QuantizedLinear

Owners = MutableMapping[Tensor, tuple[nn.Module, ...]]
"""The adapted layers that each weight of the original model went into, by identity and without keeping it alive."""


class FineTune:
    """What the callback knows of one module it has adapted.

    Merging takes the adapted layers out of the module and keeps them here. They are what a checkpoint holds and what a
    later run goes on with, and putting them back gives the very model that was trained, bit for bit.

    Args:
        module: A module with adapters.
        owners: The layers by the weights they had before, for optimizers that were built before the adapters.
        adapter: The folder they were loaded from, if any.

    Attributes:
        layers: The adapted layers by name.
        description: What the adapter is, as a checkpoint says it.
        trained: Names of the trained parameters outside the adapters.
        keys: Names, in the adapted module's state dict, of all that the fine-tune changes.
        trainable: Names of the parameters that are trained, adapters included.
    """

    def __init__(
        self, module: nn.Module, owners: Owners | None = None, *, adapter: str | PathLike[str] | None = None
    ) -> None:
        self.owners: Owners = {} if owners is None else owners
        self.adapter = adapter
        self.layers: dict[str, AdaptedLayer] = adapted_layers(module)
        self.description: Description = describe(module)
        self.trained = trained_outside_adapters(module)
        self.keys = adapter_state_keys(module)
        named = module.named_parameters(remove_duplicate=False)
        self.trainable = {canonical(name) for name, parameter in named if parameter.requires_grad}
        self._hosts = hosts(module)
        self._merged: dict[Host, nn.Module] = {}
        self._sums: dict[Host, int] = {}

    @cached_property
    def base_fingerprint(self) -> Saved:
        """Which base this is, by the weights under the adapters from before they were quantized; taken once.

        In a run these weights are frozen, and only a cast of the Trainer's (``bf16-true``) can come before this is
        asked for: it is compared as a cast.
        """
        return to_json(base_fingerprint(self.named_layers))

    @property
    def named_layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers by the names a checkpoint has."""
        return {canonical(path): layer for path, layer in self.layers.items()}

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """The config of each adapted layer."""
        return {canonical(path): layer.adapter("default").config for path, layer in self.layers.items()}

    @property
    def dense(self) -> set[str]:
        """Names of the adapted layers whose base is not quantized."""
        return {path for path, layer in self.layers.items() if not isinstance(layer.base_layer, QuantizedLinear)}

    @property
    def is_merged(self) -> bool:
        """Whether the module holds plain layers now."""
        return bool(self._merged)

    def state(self) -> dict[str, Tensor]:
        """The adapters' tensors under the names they have in the adapted module, also while it is merged."""
        state = {f"{path}.{key}": t for path, layer in self.layers.items() for key, t in layer.state_dict().items()}
        return {key: state[key] for key in self.keys if key in state}

    def thaw(self, module: nn.Module) -> None:
        """Let exactly what is of the fine-tune be trained, whatever has been frozen or unfrozen since."""
        named = list(module.named_parameters(remove_duplicate=False))
        trainable = {id(parameter) for name, parameter in named if canonical(name) in self.trainable}
        for _, parameter in named:
            parameter.requires_grad_(id(parameter) in trainable)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Put plain layers in place of the adapted ones, which move to the CPU one by one; all or nothing.

        Raises:
            MergeError: If a weight is not finite; the module is left as it is.
        """
        check_mergeable(self.layers)
        plain: dict[Host, nn.Module] = {}
        try:
            for host in self._hosts.values():
                plain[host] = merged(host)
                host.to("cpu")
        except BaseException:
            for host, layer in plain.items():
                host.to(_device(layer))
            raise
        replace(module, plain)
        self._merged = plain
        self._sums = {host: _bits(layer) for host, layer in plain.items()}

    def is_merged_in(self, module: nn.Module) -> bool:
        """Whether ``module`` holds the merged layers as they were made: not rebuilt, reloaded or trained since."""
        here = set(module.modules())
        return self.is_merged and all(
            plain in here and _bits(plain) == self._sums[host] for host, plain in self._merged.items()
        )

    def unmerge(self, module: nn.Module) -> None:
        """Put the adapted layers back."""
        for host, plain in self._merged.items():
            host.to(_device(plain)).train(plain.training)
        replace(module, {plain: host for host, plain in self._merged.items()})
        self._merged = {}


def _device(plain: nn.Module) -> torch.device:
    return next(plain.parameters()).device


def _bits(plain: nn.Module) -> int:
    """A checksum of the weights: of everything but vectors."""
    return sum(bit_sum(parameter) for parameter in plain.parameters() if parameter.dim() > 1)


FINETUNES: WeakKeyDictionary[nn.Module, FineTune] = WeakKeyDictionary()
"""The fine-tune of each module, whichever callback made it: nothing is to be injected or merged twice."""
