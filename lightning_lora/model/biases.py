"""Biases that are trained along with an adapter: which they are, and the notes that say so.

The note stands on the layer, as on a module that is trained whole: a model is often frozen before it is saved. A
layer that adapters are put on hands its note to the adapted layer, and gets it back.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.errors import AdapterError, TargetError, listing
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.attention import PROJECTIONS, SplitAttention
from lightning_lora.nn.base import layer_bias
from lightning_lora.nn.split import Split

TRAIN_BIAS = ("none", "adapted", "all")
"""Which biases may be trained: none, those of adapted layers, or every parameter of the name ``bias``."""

_NOTE = "_lora_bias_trained_with"


def choose_biases(model: nn.Module, choice: str, adapted: Iterable[str], whole: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the layers whose bias is to be trained.

    Args:
        model: Any module.
        choice: One of :data:`TRAIN_BIAS`.
        adapted: Names of the layers that are adapted, or going to be.
        whole: Names of the modules that are trained whole, with their biases.

    Raises:
        ValueError: If there is no such choice.
        TargetError: If there is no such bias, or an adapted layer is a projection of ``nn.MultiheadAttention``.
    """
    if choice not in TRAIN_BIAS:
        raise ValueError(f"train_bias must be one of {', '.join(TRAIN_BIAS)}, got {choice!r}")
    if choice == "none":
        return ()
    adapted, inside = set(adapted), tuple(f"{name}." for name in whole)
    packed = sorted(name for name in adapted if is_projection(model, name))
    if packed:
        raise TargetError(
            f"train_bias={choice!r} would train the bias of {listing(packed)}, and nn.MultiheadAttention keeps its "
            "biases packed. Use train_bias='none', exclude these layers, or train the attention whole (train=)"
        )
    here = [name for name in biased_layers(model) if not f"{name}.".startswith(inside)]
    found = tuple(name for name in here if choice == "all" or name in adapted)
    around = {name.rpartition(".")[0] for name in adapted}
    apart = [name for name in found if (name in around and name not in adapted) or _is_part(model, name)]
    if apart:
        raise TargetError(
            f"train_bias={choice!r} would train the bias of {listing(apart)}, which is taken apart while it is adapted."
            " Use train_bias='none', exclude what is adapted there, or train the module whole (train=)"
        )
    if not found:
        where = "the adapted layers have" if choice == "adapted" else f"{type(model).__name__} has"
        raise TargetError(f"train_bias={choice!r} finds nothing to train: {where} no bias. Use train_bias='none'")
    return found


def biased_layers(model: nn.Module) -> list[str]:
    """Names of all layers with a bias, an adapted layer under its own name; there are no adapters in these names."""
    hosted = tuple(f"{name}." for name in adapted_layers(model))
    return [
        name for name, module in model.named_modules() if not name.startswith(hosted) and bias_of(module) is not None
    ]


def is_projection(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a projection of ``nn.MultiheadAttention``, split or not."""
    around, _, last = name.rpartition(".")
    known = last in PROJECTIONS and around in dict(model.named_modules())
    return known and isinstance(model.get_submodule(around), nn.MultiheadAttention | SplitAttention)


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether a layer is inside of a module that is taken apart."""
    return bool(name) and isinstance(model.get_submodule(name.rpartition(".")[0]), Split)


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """The bias of a layer, adapted or not, or None."""
    return layer_bias(layer.base_layer if isinstance(layer, AdaptedLayer) else layer)


def trained_biases(model: nn.Module, name: str = "default") -> list[str]:
    """Names of the layers whose bias is trained along with adapter ``name``, also when it has been frozen since."""
    return [path for path, module in model.named_modules() if name in _noted(module)]


def refuse_shared(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse to train biases along with a second adapter: there is one of each, which both would change.

    Raises:
        AdapterError: Naming them.
    """
    names = {path: noted for path, module in model.named_modules() if (noted := _noted(module))}
    taken = [path for path in layers if path in names]
    if taken:
        raise AdapterError(
            f"the bias of {listing(taken)} is trained along with adapter {names[taken[0]][0]!r} already, and a layer "
            "has one bias for all its adapters. Use train_bias='none' for the second"
        )


def refuse_taken_apart(model: nn.Module, places: Iterable[str]) -> None:
    """Refuse to take modules apart of which a bias is trained along with an adapter that is there already.

    Raises:
        AdapterError: Naming the layers.
    """
    inside = tuple(f"{place}." for place in places)
    taken = [path for path, module in model.named_modules() if _noted(module) and f"{path}.".startswith(inside)]
    if taken:
        raise AdapterError(
            f"the bias of {listing(taken)} is trained along with another adapter, and the module it is in would be "
            "taken apart. Put both adapters on before their biases are trained, or use train_bias='none'"
        )


def train_bias_of(layer: nn.Module, name: str) -> None:
    """Let the bias of a layer be trained along with adapter ``name``, and note it."""
    bias = bias_of(layer)
    assert bias is not None
    bias.requires_grad_(True)
    vars(layer)[_NOTE] = (*_noted(layer), name)


def hand_over_note(source: nn.Module, target: nn.Module) -> None:
    """Move the note from a layer to the one in its place."""
    if _NOTE in vars(source):
        vars(target)[_NOTE] = vars(source).pop(_NOTE)
        bias = bias_of(target)
        assert bias is not None
        bias.requires_grad_(True)


def unmark_biases(model: nn.Module, *names: str) -> None:
    """Take the notes of these adapters back."""
    for module in model.modules():
        left = tuple(name for name in vars(module).pop(_NOTE, ()) if name not in names)
        if left:
            vars(module)[_NOTE] = left


def _noted(module: nn.Module) -> tuple[str, ...]:
    noted: tuple[str, ...] = vars(module).get(_NOTE, ())
    return noted
