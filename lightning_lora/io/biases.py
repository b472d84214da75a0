"""Trained biases in PEFT's format and out of it.

PEFT's ``bias`` says which: ``"lora_only"`` those of adapted layers, ``"all"`` every parameter of the name. Their values
are in the file, at ``<layer>.bias``, and within an adapted layer at ``<layer>.base_layer.bias``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io.adapter_file import AGAIN, WEIGHTS, AdapterFile
from lightning_lora.io.keys import PREFIX, canonical
from lightning_lora.model.biases import bias_of, biased_layers, is_projection, trained_biases
from lightning_lora.model.layers import require_adapters
from lightning_lora.model.parameters import trained_modules

_ADAPTED, _ALL = "adapted", "all"
_HOSTED = ".base_layer"
_COPIES = (".original_module.bias", ".modules_to_save.bias")
"""What PEFT writes beside the bias of a module that it trains whole: the one from before, and the same again."""


def choice_of(model: nn.Module, name: str) -> str:
    """Return which biases are trained along with an adapter: ``"none"``, ``"adapted"`` or ``"all"``.

    Raises:
        AdapterError: If it is neither all of the model's nor those of the adapted layers.
    """
    trained = {canonical(path) for path in trained_biases(model, name)}
    if not trained:
        return "none"
    adapted = {canonical(path) for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    everything = set(_outside(map(canonical, biased_layers(model)), map(canonical, trained_modules(model, name))))
    for choice, biases in ((_ADAPTED, adapted & everything), (_ALL, everything)):
        if trained == biases:
            return choice
    raise AdapterError(
        "PEFT's format has the biases of all layers or of the adapted ones, and with this adapter those of "
        f"{listing(trained)} are trained. merge(model) and save the model"
    )


def bias_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the biases trained along with an adapter, by their on-disk names."""
    adapted = {path for path, layer in require_adapters(model, name).items() if name in layer.adapters}
    found = {}
    for path in trained_biases(model, name):
        bias = bias_of(model.get_submodule(path))
        assert bias is not None
        found[_key(canonical(path), adapted=path in adapted)] = bias.detach()
    return found


def separated(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return a file with its biases by layer, and without them among the other tensors.

    Raises:
        AdapterError: If biases are missing, or of other shapes than in the model.
    """
    bias = file.settings.get("bias") or "none"
    if bias == "none":
        return file
    packed = [path for path in file.adapters if is_projection(model, path)]
    if packed:
        raise AdapterError(
            f"bias={bias!r}, and {listing(packed)} belongs to an nn.MultiheadAttention, of which the bias cannot be "
            "trained here. Load it with PEFT, merge_and_unload(), and go on from the merged model"
        )
    ends = tuple(file.settings.get("modules_to_save") or ())
    live = {canonical(path): bias_of(model.get_submodule(path)) for path in biased_layers(model)}
    whole = [canonical(path) for path, _ in model.named_modules() if path and path.endswith(ends)]
    wanted = [path for path in _outside(live, whole) if bias == _ALL or path in file.adapters]
    keys = {path: _key(path, adapted=path in file.adapters) for path in wanted}
    lacking = [key for key in keys.values() if key not in file.others]
    if lacking or not keys:
        raise AdapterError(
            f"bias={bias!r}, and {WEIGHTS} has no {listing(lacking) or 'bias'} of a layer of this model. {AGAIN}"
        )
    found = {path: file.others[key] for path, key in keys.items()}
    _check_shapes(found, live)
    copies = {f"{PREFIX}{path}{copy}" for path in whole for copy in _COPIES}
    others = {key: tensor for key, tensor in file.others.items() if key not in copies | set(keys.values())}
    return replace(file, others=others, biases=found)


def separated_alone(file: AdapterFile) -> AdapterFile:
    """The same without the model: a bias is what is called so, outside of modules trained whole.

    Raises:
        AdapterError: If the settings say that there are some, and there are none.
    """
    bias = file.settings.get("bias") or "none"
    if bias == "none":
        return file
    keys = {path: key for key in file.others if (path := _biased(file, key)) is not None}
    if not keys:
        raise AdapterError(f"bias={bias!r}, and {WEIGHTS} has no bias. {AGAIN}")
    others = {key: t for key, t in file.others.items() if key not in keys.values() and not key.endswith(_COPIES)}
    return replace(file, others=others, biases={path: file.others[key] for path, key in keys.items()})


def _biased(file: AdapterFile, key: str) -> str | None:
    """The layer whose trained bias is stored so, or None if it is another tensor."""
    path = key.removeprefix(PREFIX).removesuffix(".bias").removesuffix(_HOSTED)
    ends = tuple(file.settings.get("modules_to_save") or ())
    outer = [path[:index] for index, letter in enumerate(f"{path}.") if letter == "."]
    inside = bool(ends) and any(module.endswith(ends) for module in outer)
    return None if inside or not key.endswith(".bias") or not key.startswith(PREFIX) else path


def _check_shapes(found: Mapping[str, Tensor], live: Mapping[str, Tensor | None]) -> None:
    for path, tensor in found.items():
        here = live[path]
        if here is None or tensor.shape != here.shape:
            shape = None if here is None else tuple(here.shape)
            raise AdapterError(
                f"{path}.bias has shape {tuple(tensor.shape)} in the file, the model has {shape}. Load it into a model "
                "of the sizes it was trained on"
            )


def _key(path: str, *, adapted: bool) -> str:
    return f"{PREFIX}{path}{_HOSTED}.bias" if adapted else f"{PREFIX}{path}.bias"


def _outside(layers: Iterable[str], whole: Iterable[str]) -> list[str]:
    inside = tuple(f"{module}." for module in whole)
    return [path for path in layers if not f"{path}.".startswith(inside)]
