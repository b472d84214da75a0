"""The state of one module's fine-tune: adapted, or merged with the adapted layers kept aside so that it can go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from os import PathLike
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.io.description import VERSION, Description, describe
from lightning_lora.io.fingerprint import Saved, base_fingerprint, to_json
from lightning_lora.io.keys import canonical
from lightning_lora.model.checksum import bit_sum
from lightning_lora.model.layers import adapted_layers, replace
from lightning_lora.model.merge import check_mergeable, merged
from lightning_lora.model.parameters import adapter_state_keys, trained_modules, trained_outside_adapters
from lightning_lora.model.split import Host, hosts
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import QuantizedLinear

Owners = MutableMapping[Tensor, tuple[nn.Module, ...]]
"""The adapted layers that each weight of the original model went into, by identity and without keeping it alive."""


class FineTune:
    """What the callback knows of one module it trains: with adapters (:meth:`of_adapters`) or without them.

    Merging takes the adapted layers out of the module and keeps them here. They are what a checkpoint holds and what a
    later run goes on with, and putting them back gives the very model that was trained, bit for bit.

    Attributes:
        description: What is trained, as a checkpoint says it.
        keys: Names, in the adapted module's state dict, of all that the fine-tune changes.
        trained: Names of the trained parameters outside the adapters.
        trainable: Names of the parameters that are trained, adapters included.
        whole: Names of the modules trained whole; ``""`` is the module itself.
        base: The layers under the fine-tune whose weights stay as they were, by the names a checkpoint has.
        layers: The adapted layers by name; without adapters there are none, and merging changes nothing.
        owners: The layers by the weights they had before, for optimizers that were built before the adapters.
        adapter: The folder the adapters were loaded from, if any.
    """

    def __init__(
        self,
        *,
        description: Description,
        keys: Sequence[str],
        trained: Sequence[str],
        trainable: Iterable[str],
        whole: Sequence[str],
        base: Mapping[str, nn.Module],
        hosts: dict[str, Host] | None = None,
        layers: dict[str, AdaptedLayer] | None = None,
        owners: Owners | None = None,
        adapter: str | PathLike[str] | None = None,
    ) -> None:
        self.description = description
        self.keys = keys
        self.trained = trained
        self.trainable = {canonical(name) for name in trainable}
        self.whole = whole
        self.base = base
        self.layers: dict[str, AdaptedLayer] = {} if layers is None else layers
        self.owners: Owners = {} if owners is None else owners
        self.adapter = adapter
        self._hosts: dict[str, Host] = {} if hosts is None else hosts
        self._merged: dict[Host, nn.Module] = {}
        self._sums: dict[Host, int] = {}

    @classmethod
    def of_adapters(
        cls, module: nn.Module, owners: Owners | None = None, *, adapter: str | PathLike[str] | None = None
    ) -> FineTune:
        """What is known of a module with adapters."""
        named = module.named_parameters(remove_duplicate=False)
        layers = adapted_layers(module)
        return cls(
            description=describe(module),
            keys=adapter_state_keys(module),
            trained=trained_outside_adapters(module),
            trainable=[name for name, parameter in named if parameter.requires_grad],
            whole=trained_modules(module),
            base={canonical(path): layer for path, layer in layers.items()},
            hosts=hosts(module),
            layers=layers,
            owners=owners,
            adapter=adapter,
        )

    @classmethod
    def of_modules(cls, module: nn.Module, method: str, whole: Sequence[str]) -> FineTune:
        """What is known of a module without adapters, of which the modules named in ``whole`` are trained."""
        trained = [name for name, _ in module.named_parameters(remove_duplicate=False) if _is_within(name, whole)]
        return cls(
            description={
                "version": VERSION,
                "method": method,
                "train": sorted(map(canonical, whole)),
                "quantization": "none",
            },
            keys=[key for key in module.state_dict() if _is_within(key, whole)],
            trained=trained,
            trainable=trained,
            whole=whole,
            base={
                canonical(path): layer
                for path, layer in module.named_modules()
                if not _is_within(path, whole) and isinstance(getattr(layer, "weight", None), nn.Parameter)
            },
        )

    @cached_property
    def base_fingerprint(self) -> Saved:
        """Which base this is, by its weights from before they were quantized; taken once.

        In a run these weights are frozen, and only a cast of the Trainer's (``bf16-true``) can come before this is
        asked for: it is compared as a cast.
        """
        return to_json(base_fingerprint(self.base))

    def trains(self, name: str) -> bool:
        """Whether a module, parameter or buffer is within a module that is trained whole."""
        return _is_within(name, self.whole)

    def is_in(self, module: nn.Module) -> bool:
        """Whether ``module`` has what was trained: its adapters, or these merged by :meth:`merge`, or no adapters."""
        return self.is_merged or not self.layers or bool(adapted_layers(module))

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


def _is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, parameter or buffer is one of ``modules`` or inside one; all are inside ``""``."""
    return any(path in ("", name) or name.startswith(f"{path}.") for path in modules)
