"""What ``AdapterMonitor`` looks at: a class for each thing, told what happens in a run and asked for values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.callbacks.finetune import FINETUNES
from lightning_lora.errors import listing
from lightning_lora.io.keys import canonical
from lightning_lora.metrics.effective_rank import effective_rank
from lightning_lora.metrics.gradient_norm import gradient_norm
from lightning_lora.metrics.memory import MIB, SavedActivations, holdings, memory_name, peak_memory
from lightning_lora.metrics.stable_rank import stable_rank
from lightning_lora.metrics.throughput import Stopwatch, Where, count_tokens
from lightning_lora.metrics.update_norm import relative_update_norm
from lightning_lora.metrics.updates import base_norms, update_factors, updates
from lightning_lora.model.layers import adapted_layers, require_adapters
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.optim.report import state_tensors

Values = dict[str, float]


class Settings(Protocol):
    """What probes need to know of the callback."""

    detail: str
    tokens: Where


class Probe(ABC):
    """One thing that is looked at in a run.

    Args:
        settings: The callback.
        trainer: The Trainer.
        module: What it trains, with adapters.
    """

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        self.settings = settings
        self.trainer = trainer
        self.module = module

    def before_batch(self, *, due: bool) -> None:
        """A batch begins; ``due`` if values will be asked for after the step it belongs to."""

    def before_backward(self) -> None:
        """A forward pass is over."""

    def before_step(self, optimizer: Optimizer, loss_scale: float) -> None:
        """An optimizer is about to step, and values will be asked for after it.

        Args:
            optimizer: Which.
            loss_scale: What its gradients are multiplied by.
        """

    def after_batch(self, batch: Any) -> None:
        """A batch is done."""

    def pause(self) -> None:
        """What follows is no training, up to the next batch."""

    def close(self) -> None:
        """The run is over."""

    @abstractmethod
    def values(self) -> Values:
        """Return what to log now, by name. Every process calls it at the same steps."""


class Updates(Probe):
    """How far the adapters have moved the weights, and over how many directions."""

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(settings, trainer, module)
        self._bases: dict[str, float] = {}
        dense = [name for name, layer in layers_of(module).items() if update_factors(layer) is None]
        if dense:
            rank_zero_info(
                f"AdapterMonitor: the updates of {listing(dense)} are not of low rank, so effective and stable rank "
                "leave them out"
            )

    def values(self) -> Values:
        """``update_norm``, and ``effective_rank`` and ``stable_rank`` where there are singular values."""
        layers = layers_of(self.module)
        self._bases |= base_norms({name: layer for name, layer in layers.items() if name not in self._bases})
        found = updates(layers)
        norms = torch.tensor([update.norm for update in found.values()])
        bases = torch.tensor([self._bases[name] for name in found])
        spectra = {name: update.values for name, update in found.items() if update.values is not None}
        whole = {"update_norm": relative_update_norm(norms, bases).item()}
        parts = {"update_norm": dict(zip(found, (norms / bases).tolist(), strict=True))}
        for key, rank in (("effective_rank", effective_rank), ("stable_rank", stable_rank)):
            parts[key] = {name: rank(values).item() for name, values in spectra.items()}
            if spectra:
                whole[key] = sum(parts[key].values()) / len(spectra)
        if self.settings.detail == "layers":
            whole |= {f"{key}/{name}": value for key, part in parts.items() for name, value in part.items()}
        return whole


class GradientNorms(Probe):
    """The length of the gradient of each kind of tensor: of all ``A``, of all ``B``."""

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(settings, trainer, module)
        self._found: dict[str, list[Tensor]] = {}

    def before_step(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Take the gradients this optimizer steps with; those of another may be older."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients: dict[str, list[Tensor]] = {}
        for layer in require_adapters(self.module).values():
            for name in layer.active:
                for leaf, parameter in layer.adapter(name).named_parameters():
                    if id(parameter) in held and parameter.grad is not None:
                        gradients.setdefault(leaf, []).append(parameter.grad)
        for leaf, tensors in gradients.items():
            self._found.setdefault(leaf, []).append(gradient_norm(tensors) / loss_scale)

    def values(self) -> Values:
        """``grad_norm/<tensor>``; of several optimizers together."""
        found = {f"grad_norm/{leaf}": gradient_norm(norms).item() for leaf, norms in self._found.items()}
        self._found = {}
        return found


class TokensPerSecond(Probe):
    """How fast training goes, of all processes together."""

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(settings, trainer, module)
        self._clock = Stopwatch()
        self._tokens: int | Tensor = 0
        self._told = False

    def before_batch(self, *, due: bool) -> None:
        """Let the clock run, from the first batch on."""
        self._clock.start()

    def after_batch(self, batch: Any) -> None:
        """Count tokens; on the device, so that it is not waited for."""
        found = count_tokens(batch, self.settings.tokens)
        if found is None and not self._told:
            self._told = True
            rank_zero_info(
                "AdapterMonitor: the batch holds no tokens (no input_ids, no integers with two axes or more), so "
                "tokens per second are not logged. Say where they are with tokens="
            )
        self._tokens = self._tokens + (0 if found is None else found)

    def pause(self) -> None:
        """Hold the clock."""
        self._clock.stop()

    def values(self) -> Values:
        """``tokens_per_second`` since the last time."""
        here = torch.tensor([float(self._tokens), 0.0])  # a device is waited for here, before the clock is read
        here[1] = self._clock.seconds
        tokens, seconds = of_all_processes(self.trainer, here).unbind(1)
        self._clock, self._tokens = Stopwatch(), 0
        self._clock.start()
        return {"tokens_per_second": (tokens.sum() / seconds.max()).item()} if tokens.sum() > 0 else {}


class Memory(Probe):
    """The peak, and once what the run holds."""

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        super().__init__(settings, trainer, module)
        self._device = trainer.strategy.root_device
        self._watch: SavedActivations | None = None
        self._activations: int | None = None
        self._gradients = 0
        self._told = False

    def before_batch(self, *, due: bool) -> None:
        """Watch the forward pass of one batch."""
        if due and self._activations is None:
            self._watch = SavedActivations(self.module).__enter__()

    def before_backward(self) -> None:
        """Enough has been seen."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._activations, self._watch = self._watch.bytes, None

    def before_step(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Count gradients while they are there."""
        self._gradients = max(self._gradients, holdings(self.module).gradients)

    def after_batch(self, batch: Any) -> None:
        """There may have been no backward pass."""
        self.before_backward()

    def close(self) -> None:
        """Take the watch away."""
        self.before_backward()

    def values(self) -> Values:
        """``peak_memory_MiB/<of what>``; the first time also ``memory_MiB/<part>``."""
        peak = peak_memory(self._device)
        found: Values = {}
        if peak is not None:
            here = torch.tensor([float(peak)])
            most = of_all_processes(self.trainer, here).max().item()
            found[f"peak_memory_MiB/{memory_name(self._device)}"] = most / MIB
        if not self._told and self._activations is not None:
            self._told = True
            states = chain.from_iterable(map(state_tensors, self.trainer.optimizers))
            parts = replace(holdings(self.module, states), gradients=self._gradients).to_dict()
            parts["activations"] = self._activations
            found |= {f"memory_MiB/{part}": size / MIB for part, size in parts.items()}
        return found


PROBES: dict[str, type[Probe]] = {
    "update": Updates,
    "grad_norm": GradientNorms,
    "throughput": TokensPerSecond,
    "memory": Memory,
}
"""What can be looked at, by the name users give it."""


def layers_of(module: LightningModule) -> Mapping[str, AdaptedLayer]:
    """The adapted layers by their names in a checkpoint, also of a module the callback has just merged.

    Raises:
        AdapterError: If there are none.
    """
    finetune = FINETUNES.get(module)
    if finetune is not None and finetune.is_merged and not adapted_layers(module):
        layers = finetune.layers
    else:
        layers = require_adapters(module)
    return {canonical(name): layer for name, layer in layers.items()}


def of_all_processes(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the values of every process, one row for each. Nothing is exchanged where there is one."""
    if trainer.world_size == 1:
        return values[None]
    gathered = trainer.strategy.all_gather(values.to(trainer.strategy.root_device))
    return gathered.reshape(trainer.world_size, -1).cpu()
