"""The state of one module's fine-tune: adapted, or merged with the adapted layers kept aside so that it can go on."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from os import PathLike
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.io.description import VERSION, Description, describe
from lightning_lora.io.keys import canonical
from lightning_lora.model.checksum import bit_sum
from lightning_lora.model.layers import adapted_layers, replace
from lightning_lora.model.merge import check_mergeable, merged
from lightning_lora.model.parameters import adapter_state_keys, trained_modules, trained_outside_adapters
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, stored_weight, weight_device
from lightning_lora.nn.lora import LoRAConfig

Owners = MutableMapping[Tensor, AdaptedLayer]
"""The adapted layer that each weight of the original model went into, by identity and without keeping it alive."""


class FineTune:
    """What the callback knows of one module it trains: with adapters (:meth:`of_adapters`) or without them.

    Merging takes the adapted layers out of the module and keeps them here. They are what a checkpoint holds and what a
    later run goes on with, and putting them back gives the very model that was trained, bit for bit.

    Attributes:
        description: What is trained, as a checkpoint says it.
        keys: Names, in the adapted module's state dict, of all that the fine-tune changes.
        trained: Names of the trained parameters outside the adapters.
        whole: Names of the modules trained whole; ``""`` is the module itself.
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
        whole: Sequence[str],
        layers: dict[str, AdaptedLayer] | None = None,
        owners: Owners | None = None,
        adapter: str | PathLike[str] | None = None,
    ) -> None:
        self.description = description
        self.keys = keys
        self.trained = trained
        self.whole = whole
        self.layers: dict[str, AdaptedLayer] = {} if layers is None else layers
        self.owners: Owners = {} if owners is None else owners
        self.adapter = adapter
        self._merged: dict[AdaptedLayer, nn.Module] = {}
        self._sums: dict[AdaptedLayer, int] = {}

    @classmethod
    def of_adapters(
        cls, module: nn.Module, owners: Owners | None = None, *, adapter: str | PathLike[str] | None = None
    ) -> FineTune:
        """What is known of a module with adapters."""
        return cls(
            description=describe(module),
            keys=adapter_state_keys(module),
            trained=trained_outside_adapters(module),
            whole=trained_modules(module),
            layers=adapted_layers(module),
            owners=owners,
            adapter=adapter,
        )

    @classmethod
    def of_modules(cls, module: nn.Module, method: str, whole: Sequence[str]) -> FineTune:
        """What is known of a module without adapters, of which the modules named in ``whole`` are trained."""
        return cls(
            description={
                "version": VERSION,
                "method": method,
                "train": sorted(map(canonical, whole)),
                "quantization": "none",
            },
            keys=[key for key in module.state_dict() if _is_within(key, whole)],
            trained=[name for name, _ in module.named_parameters(remove_duplicate=False) if _is_within(name, whole)],
            whole=whole,
        )

    def trains(self, name: str) -> bool:
        """Whether a module, parameter or buffer is within a module that is trained whole."""
        return _is_within(name, self.whole)

    def is_in(self, module: nn.Module) -> bool:
        """Whether ``module`` has what was trained: its adapters, or these merged by :meth:`merge`, or no adapters."""
        return self.is_merged or not self.layers or bool(adapted_layers(module))

    @property
    def configs(self) -> dict[str, LoRAConfig]:
        """The config of each adapted layer."""
        configs = {canonical(path): layer.adapter("default").config for path, layer in self.layers.items()}
        return {path: config for path, config in configs.items() if isinstance(config, LoRAConfig)}

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

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Put plain layers in place of the adapted ones, which move to the CPU one by one; all or nothing.

        Raises:
            MergeError: If a weight is not finite; the module is left as it is.
        """
        check_mergeable(self.layers)
        plain: dict[AdaptedLayer, nn.Module] = {}
        try:
            for layer in self.layers.values():
                plain[layer] = merged(layer)
                layer.to("cpu")
        except BaseException:
            for layer, linear in plain.items():
                layer.to(weight_device(linear))
            raise
        replace(module, plain)
        self._merged = plain
        self._sums = {layer: bit_sum(stored_weight(linear)) for layer, linear in plain.items()}

    def is_merged_in(self, module: nn.Module) -> bool:
        """Whether ``module`` holds the merged layers as they were made: not rebuilt, reloaded or trained since."""
        here = set(module.modules())
        return self.is_merged and all(
            plain in here and bit_sum(stored_weight(plain)) == self._sums[layer]
            for layer, plain in self._merged.items()
        )

    def unmerge(self, module: nn.Module) -> None:
        """Put the adapted layers back."""
        for layer, plain in self._merged.items():
            layer.to(weight_device(plain)).train(plain.training)
        replace(module, {plain: layer for layer, plain in self._merged.items()})
        self._merged = {}


FINETUNES: WeakKeyDictionary[nn.Module, FineTune] = WeakKeyDictionary()
"""The fine-tune of each module, whichever callback made it: nothing is to be injected or merged twice."""


def _is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, parameter or buffer is one of ``modules`` or inside one; all are inside ``""``."""
    return any(path in ("", name) or name.startswith(f"{path}.") for path in modules)
