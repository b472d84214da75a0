"""A LightningModule from a checkpoint of adapters, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_lora.callbacks.checkpoints import complete_checkpoint
from lightning_lora.callbacks.finetune import FINETUNES, FineTune
from lightning_lora.callbacks.settings import BASELINES, METHODS
from lightning_lora.errors import CheckpointError, listing
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.description import CHANCE, KEY, Description
from lightning_lora.io.keys import canonical
from lightning_lora.model.inject import apply
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.split import named_layers
from lightning_lora.model.targets import Plan
from lightning_lora.quantization.config import NF4Config, QuantizationConfig
from lightning_lora.quantization.formats import from_storage
from lightning_lora.quantization.quantize import quantize

Module = TypeVar("Module", bound=LightningModule)


def load_from_checkpoint(kind: type[Module], path: str | Path, **arguments: Any) -> Module:
    """Build a LightningModule and put the adapters of a checkpoint into it, over the base they were trained on.

    ``Module.load_from_checkpoint`` expects every weight to be in the file; a checkpoint of adapters leaves those of the
    base to the module. This builds the module in the same way (``save_hyperparameters``, ``configure_model`` and
    ``on_load_checkpoint`` do their part), then adapts and quantizes it as it was in training and loads the file
    strictly. The result is on the CPU and in evaluation mode; ``merge(module)`` turns it into plain layers.

    Args:
        kind: The LightningModule's class; it has to bring the base's weights.
        path: A checkpoint written in a run with :class:`LoRACallback`.
        arguments: Arguments of the module that are to be others than in the checkpoint, or are not in it.

    Raises:
        CheckpointError: If the file is no checkpoint of adapters, or does not fit the module.
        TypeError: If ``kind`` is a module rather than its class.
    """
    if not isinstance(kind, type):
        name = type(kind).__name__
        raise TypeError(f"load_from_checkpoint builds the module, so it takes a class, and got a {name}; pass {name}")
    checkpoint = read_checkpoint(Path(path))
    with warnings.catch_warnings():  # the keys it does not find are those of the base, and are checked below
        warnings.filterwarnings("ignore", message="Found keys that are")
        module = kind.load_from_checkpoint(path, map_location="cpu", strict=False, **arguments)
    finetune = _prepared(module, checkpoint)
    try:
        complete_checkpoint(checkpoint, finetune, module)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    module.load_state_dict(checkpoint["state_dict"])
    FINETUNES[module] = finetune
    return module.eval()


def _prepared(module: LightningModule, checkpoint: Mapping[str, Any]) -> FineTune:
    """Bring the module to the state it was trained in."""
    description: Description = checkpoint[KEY]
    if description["method"] in BASELINES:
        return FineTune.of_modules(module, description["method"], _live(module, description["train"]))
    if not adapted_layers(module):
        apply(module, _plan(module, description), start=False)
        storage, at_edges = _storage(description), description.get("embeddings")
        if storage is not None or at_edges:
            _resume(module, checkpoint["state_dict"])  # what the base was quantized without has to be known before
            with warnings.catch_warnings():  # the adapters are trained: where they started no longer matters
                warnings.filterwarnings("ignore", message="quantization=", category=UserWarning)
                quantize(module, storage or NF4Config(), embeddings="int8" if at_edges else None)
    return FineTune.of_adapters(module)


def _plan(module: LightningModule, description: Description) -> Plan:
    live = dict(zip(description["targets"], _live(module, description["targets"]), strict=True))
    methods = {name: METHODS[_of(description, "method", name)] for name in description["targets"]}
    layers = {
        live[name]: method(
            **{field: _of(description, field, name) for field in method.decisive if field in description},
            **_init(description, name),
        )
        for name, method in methods.items()
    }
    return Plan(
        layers=layers,
        train=_live(module, description["train"]),
        biases=_live(module, description.get("biases", ())),
    )


def _live(module: LightningModule, names: Iterable[str]) -> tuple[str, ...]:
    """The names that modules of a checkpoint have here."""
    live = {canonical(name): name for name, _ in (*module.named_modules(), *named_layers(module))}
    absent = [name for name in names if name not in live]
    if absent:
        raise CheckpointError(
            f"the checkpoint trains {listing(absent)}, which {type(module).__name__} does not have. Build it with the "
            "arguments it was trained with"
        )
    return tuple(live[name] for name in names)


def _init(description: Description, layer: str) -> dict[str, Any]:
    """The init of an adapter whose start was computed; how that of others was drawn does not matter any more."""
    start = str(_of(description, "start", layer)) if "start" in description else CHANCE
    return {} if start == CHANCE else {"init": start}


def _resume(module: LightningModule, state: Mapping[str, Tensor]) -> None:
    for path, layer in adapted_layers(module).items():
        for name in layer.adapters:
            prefix = f"{path}.adapters.{name}."
            layer.adapter(name).resume({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})


def _of(description: Description, field: str, layer: str) -> Any:
    """A field of one layer: descriptions hold one value where all layers agree."""
    value = description[field]
    return value[layer] if isinstance(value, dict) else value


def _storage(description: Description) -> QuantizationConfig | None:
    """How the base was stored but for its edges; layers that could not be quantized then cannot be now."""
    inside = [name for name in description["targets"] if name not in description.get("embeddings", {})]
    found = {_of(description, "quantization", name) for name in inside} - {"none"}
    return from_storage(found.pop()) if found else None
