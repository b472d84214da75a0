"""EVA: adapters that start in the directions in which the inputs of their layers vary.

Ranks go to the layers where that says most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.model.active import disabled
from lightning_lora.model.layers import require_adapters
from lightning_lora.model.progress import progress
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.incremental import IncrementalSVD
from lightning_lora.nn.lora import LoRA

Forward = Callable[[nn.Module, Any], object]

_IGNORED_LABEL = -100


def call(model: nn.Module, batch: Any) -> object:
    """``model(**batch)`` for a mapping, ``model(batch)`` for anything else."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def initialize_eva(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    name: str = "default",
    rho: float = 2.0,
    tau: float = 0.99,
    forward: Forward = call,
) -> nn.Module:
    """Start the adapters that have ``init="eva"`` from data, in place, and return the model (EVA, arXiv 2410.07170).

    ``A`` becomes the first right singular vectors of the layer's inputs (less their mean), ``B`` zero: training starts
    at the base model. Of ``sum(r)`` vectors in all, those are used that explain most of the variance of their layer's
    inputs: at least 1 in each layer, at most ``rho r``. ``alpha`` is changed along with ``r``, so that the scaling
    stays.

    Call it before optimizers are built, for the parameters are new ones. The model runs in evaluation mode and without
    its adapters. Memory is that of one batch, and of ``rho r`` vectors for each layer.

    Args:
        model: A model with adapters of ``LoRAConfig(init="eva")``.
        batches: A few batches, on the model's device. Of a mapping with ``attention_mask`` (and ``labels``), padding
            (and positions labelled -100) are left out. It stops early once no direction in use turns any more.
        name: The adapter's name.
        rho: How far ranks are shared between layers; 1 keeps every ``r``.
        tau: Cosine from which on a direction counts as settled.
        forward: How to call the model with a batch, e.g. ``lambda model, batch: model(batch[0])``.

    Raises:
        AdapterError: If the model has no such adapter, or none that starts from data.
        ValueError: If ``rho`` or ``tau`` is out of range, or a layer sees too few inputs or such as are not finite.
    """
    return start_in(model, directions(model, batches, name=name, rho=rho, tau=tau, forward=forward), name=name)


@torch.no_grad()
def directions(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    name: str = "default",
    rho: float = 2.0,
    tau: float = 0.99,
    forward: Forward = call,
    agree: Callable[[bool], bool] = bool,
) -> dict[str, Tensor]:
    """Return where :func:`initialize_eva` would start: ``A`` of each layer, of the rank that falls to it.

    Arguments and errors are those it has; the model stays as it is. What ``agree`` is told after each batch is whether
    the directions have settled, and what it returns is whether to stop: processes that run the model together have to
    stop together.
    """
    if not (rho >= 1 and 0 <= tau <= 1):
        raise ValueError(f"rho must be at least 1 and tau between 0 and 1, got rho={rho} and tau={tau}")
    hosts = _waiting(model, name)
    found = {path: IncrementalSVD(_most(layer, name, rho)) for path, layer in hosts.items()}
    budget = sum(_lora(layer, name).config.r for layer in hosts.values())
    ranks: dict[str, int] = {}
    with _evaluated(model), disabled(model):
        for batch in progress(batches, "inputs of the layers"):
            with _watched(hosts, partial(_take_in, found, _kept(batch))):
                forward(model, batch)
            ranks = share({path: svd.explained.tolist() for path, svd in found.items()}, budget)
            if agree(all(svd.is_settled(ranks[path], tau) for path, svd in found.items())):
                break
    _require_enough(found)
    return {path: found[path].components[: ranks[path]] for path in hosts}


def start_in(model: nn.Module, found: Mapping[str, Tensor], *, name: str = "default") -> nn.Module:
    """Start adapters in directions found before, with the ranks that these have, in place, and return the model."""
    hosts = _waiting(model, name)
    for path, lora_A in found.items():
        hosts[path].put(name, _started(hosts[path], name, lora_A))
    return model


def share(explained: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Give out ``budget`` ranks: one to each layer, the others to the components that explain most, wherever they are.

    Args:
        explained: Share of the variance of each component, in falling order, by layer.
        budget: At least one for each layer.
    """
    rest = [(value, path) for path, values in explained.items() for value in values[1:]]
    ranks = dict.fromkeys(explained, 1)
    for _, path in sorted(rest, key=lambda item: -item[0])[: budget - len(ranks)]:
        ranks[path] += 1
    return ranks


def _waiting(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    present = {path: layer for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    hosts = {path: layer for path, layer in present.items() if layer.adapter(name).config.starts_from == "data"}
    if not hosts:
        raise AdapterError(
            f"adapter {name!r} does not start from data. Make it so: inject(model, config=LoRAConfig(init='eva'))"
        )
    foreign = [path for path, layer in hosts.items() if not isinstance(layer.adapter(name), LoRA)]
    if foreign:
        raise AdapterError(f"EVA starts LoRA alone; {listing(foreign)} has another method")
    return hosts


def _lora(layer: AdaptedLayer, name: str) -> LoRA:
    adapter = layer.adapter(name)
    assert isinstance(adapter, LoRA)
    return adapter


def _most(layer: AdaptedLayer, name: str, rho: float) -> int:
    return min(round(rho * _lora(layer, name).config.r), layer.kind.in_features, layer.kind.out_features)


def _require_enough(found: Mapping[str, IncrementalSVD]) -> None:
    short = [f"{path} ({svd.count} of {svd.k + 1})" for path, svd in found.items() if svd.count <= svd.k]
    if short:
        raise ValueError(
            f"too few inputs have reached {listing(short)}: for k directions it takes more than k of them (tokens, or "
            "positions). Pass more batches, or a smaller rho or r"
        )


def _take_in(
    found: Mapping[str, IncrementalSVD], kept: Tensor | None, path: str, layer: AdaptedLayer, x: Tensor
) -> None:
    if kept is not None and kept.shape == x.shape[: kept.dim()]:
        x = x[kept.to(x.device)]
    rows = layer.kind.features(x)
    if not len(rows):
        return
    if not torch.stack(torch.aminmax(rows)).isfinite().all():
        raise ValueError(f"the input of {path} holds NaN or infinity")
    found[path].update(rows)


@contextmanager
def _watched(hosts: Mapping[str, AdaptedLayer], see: Callable[[str, AdaptedLayer, Tensor], None]) -> Iterator[None]:
    """Show the inputs of layers, as their base layers get them."""

    def hook(path: str, layer: AdaptedLayer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: see(path, layer, args[0])

    handles = [layer.base_layer.register_forward_pre_hook(hook(path, layer)) for path, layer in hosts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _kept(batch: Any) -> Tensor | None:
    """Which positions of a batch of tokens count, or None for all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor):
        return None
    labels = batch.get("labels")
    told = isinstance(labels, Tensor) and labels.shape == mask.shape
    return mask.bool() & (labels != _IGNORED_LABEL) if told else mask.bool()


def _started(layer: AdaptedLayer, name: str, lora_A: Tensor) -> LoRA:
    old = _lora(layer, name)
    config = old.config.with_rank(len(lora_A))
    new = LoRA(config, old.kind, device=old.lora_A.device, dtype=old.lora_A.dtype)
    new.start_with(lora_A)
    return new.train(old.training).requires_grad_(old.lora_A.requires_grad)
