"""A batch whose rows go through different adapters: one model, one base product, many fine-tunes.

Which rows go where is noted on the layers, so it holds for the whole process: two threads that use one model at the
same time need a copy each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.model.layers import adapted_layers, require_adapters
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.experts import ExpertsKind
from lightning_lora.nn.rows import Rows


@contextmanager
def routed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the context row ``i`` of a batch goes through adapter ``names[i]``, or through the plain base for None.

    It computes what each row would give alone, in one forward pass whose frozen products are those of the batch. Which
    adapters are active does not matter. Gradients reach each adapter from its own rows, if it is trainable:
    ``activate`` those to train first, and call ``backward`` within the context where activations are checkpointed.

    The first axis of every adapted layer's input has to be the batch, or the batch with each row repeated equally often
    in place, as after ``x.flatten(0, 1)``. Time-first models do not fit. Contexts nest, the innermost holds; within
    :func:`disabled` it is the base.

    A layer's ``weight``, which is not one weight then, lies on the meta device: it tells shape and dtype. A compiled
    model compiles once for all routings, in pieces around each adapted layer (so not with ``fullgraph=True``).

    Args:
        model: A model with adapters, or a part of one.
        names: One for each row. Where rows are repeated (beam search), repeat the names.

    Raises:
        AdapterError: If there is no adapter of one of the names, or it is on stacked weights of experts, and, when the
            model is called, if no argument is a batch of that many rows.
        TypeError: If ``names`` is not a sequence of names.
    """
    names = _as_names(names)
    layers = require_adapters(model, *(name for name in names if name is not None))
    _refuse_experts(layers, names)
    rows = Rows(names, {layer: path for path, layer in layers.items()})

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, it would be the check of its first batch
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_batch(module, [*args, *kwargs.values()], len(names))

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        with computing(model, rows):
            yield model
    finally:
        hook.remove()


@contextmanager
def computing(model: nn.Module, rows: Rows) -> Iterator[None]:
    """Within the context the adapted layers of ``model`` compute ``rows``, whatever is active."""
    before = {layer: layer.rows for layer in require_adapters(model).values()}
    try:
        for layer in before:
            layer.rows = rows
        yield
    finally:
        outer = next(iter(before.values()))
        for layer in {**before, **dict.fromkeys(adapted_layers(model).values())}:
            layer.rows = before.get(layer, outer)  # a layer adapted meanwhile computes what the others do


def _refuse_experts(layers: Mapping[str, AdaptedLayer], names: Iterable[str | None]) -> None:
    stacks = [path for path, layer in layers.items() if isinstance(layer.kind, ExpertsKind)]
    over = {name: [path for path in stacks if name in layers[path].adapters] for name in names if name is not None}
    found = [f"{name!r} on {listing(paths)}" for name, paths in over.items() if paths]
    if found:
        raise AdapterError(
            f"adapter {listing(found)} cannot be routed: weights of experts are read for the whole batch, not called "
            "row by row. Activate one adapter at a time, or merge(copy.deepcopy(model))"
        )


def _as_names(names: Sequence[str | None]) -> tuple[str | None, ...]:
    several = not isinstance(names, str) and isinstance(names, Iterable)
    if not several or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"names must be a list with a name, or None, for each row of the batch; got {names!r}")
    if not names:
        raise ValueError("names is empty; pass one for each row of the batch")
    return tuple(names)


def _check_batch(module: nn.Module, arguments: Iterable[Any], batch: int) -> None:
    """See that an argument is a batch of ``batch`` rows, if any argument is a batch at all."""
    found = [tensor.shape[0] for tensor in _tensors(arguments) if tensor.dim() > 0]
    if found and batch not in found:
        raise AdapterError(
            f"{batch} names were routed, but {type(module).__name__} is called with a batch of {found[0]} rows. Pass "
            "one name for each row; where rows are repeated (beam search), repeat the names"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
