"""Adapters on ``nn.MultiheadAttention``, in PEFT's format and out of it.

PEFT adapts the packed projection ``(E) -> (3 E)`` with one pair of factors, and ``out_proj`` with another of the same
rank and scaling, always both. Ours are up to four, each with a rank of its own. They are written as one pair whose
``B`` is block-diagonal, which is the same function, and zero where there is no adapter:

    A = [A_q; A_k; A_v]  (R, E)      B = diag(B_q, B_k, B_v)  (3 E, R)      R = max(r_q + r_k + r_v, r_out)

PEFT up to 0.21.2 adds the update of ``out_proj`` twice (huggingface/peft pull request 3774), in training too, so that
is what its files mean: that ``B`` is halved when it is written and doubled when it is read, both exact.

The header of the file says which ranks they had. A file without one (PEFT's own) is read as four adapters of rank
``R``, those of ``q``, ``k`` and ``v`` with a copy of ``A`` each: the same function again, but trained on, the copies
go their own ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io import peft
from lightning_lora.io.adapter_file import AdapterFile
from lightning_lora.io.keys import canonical
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.attention import PROJECTIONS, SplitAttention
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig

Tensors = Mapping[str, Tensor]
_IN, _OUT = PROJECTIONS[:3], PROJECTIONS[3]
_INSIDE = ".base_layer.out_proj"
_A, _B = "lora_A.weight", "lora_B.weight"
_TIMES = 2
"""How often PEFT adds the update of ``out_proj``, up to :data:`PEFT_VERSION`."""

PEFT_VERSION = "0.21.2"
"""The last version of PEFT whose meaning is known; files with adapters on attention name it."""


def pack_configs(model: nn.Module, configs: Mapping[str, AdapterConfig]) -> dict[str, AdapterConfig]:
    """Return the config of each layer as PEFT has them: one for a whole attention.

    Args:
        model: The model the adapters are in.
        configs: The config of each adapted layer, by its canonical name.

    Raises:
        AdapterError: If the adapters on one attention cannot be one of PEFT's.
    """
    around = _attentions(model)
    packed = {path: config for path, config in configs.items() if _around(path) not in around}
    for path, attention in around.items():
        mine = {name: configs[f"{path}.{name}"] for name in PROJECTIONS if f"{path}.{name}" in configs}
        if mine:
            _require_one_size(path, attention)
            packed[path] = _packed_config(path, mine)
    return packed


def pack_tensors(model: nn.Module, tensors: Mapping[str, Tensors]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the adapters on attention by PEFT's layers, and by their on-disk names in them.

    Args:
        model: The model the adapters are in.
        tensors: ``lora_A`` and ``lora_B`` of each adapted layer, by its canonical name.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    for path, attention in _attentions(model).items():
        mine = {name: tensors[f"{path}.{name}"] for name in PROJECTIONS if f"{path}.{name}" in tensors}
        if mine:
            _require_one_size(path, attention)
            packed |= _packed(path, mine, attention.embed_dim)
    return packed


def is_packed(model: nn.Module, path: str) -> bool:
    """Whether the adapter at ``path`` is written as a part of an attention's."""
    return _around(canonical(path)) in _attentions(model)


def update_of_part(path: str) -> tuple[str, str, int]:
    """What a pair of factors in a file stands for, without the model.

    Args:
        path: The layer as the file names it.

    Returns:
        Its name for people, the name under which the config has its rank and scaling, and how often it is added.
    """
    if path.endswith(_INSIDE):
        around = path.removesuffix(_INSIDE)
        return f"{around}.{_OUT}", around, _TIMES
    return path, path, 1


def unpacked(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return a file with the adapters on attention as if they were on linear layers, which they are here.

    Raises:
        AdapterError: If tensors are missing, of other shapes, or not what the header says.
    """
    kinds = (nn.MultiheadAttention, SplitAttention)
    attentions = {canonical(path): module for path, module in model.named_modules() if isinstance(module, kinds)}
    return _unpacked_in({path: module.embed_dim for path, module in attentions.items()}, file)


def unpacked_alone(file: AdapterFile) -> AdapterFile:
    """The same without the model: an attention is what has a pair of factors for its ``out_proj`` inside.

    Raises:
        AdapterError: If tensors are missing, of other shapes, or not what the header says.
    """
    pairs = {path: file.adapters[path] for path in attentions_in(file)}
    return _unpacked_in({path: pair[_A].shape[-1] if _A in pair else 0 for path, pair in pairs.items()}, file)


def attentions_in(file: AdapterFile) -> list[str]:
    """Names of the attentions in a file as it was read."""
    return [path for path in file.adapters if path + _INSIDE in file.adapters]


def _unpacked_in(widths: Mapping[str, int], file: AdapterFile) -> AdapterFile:
    adapters = dict(file.adapters)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, width in widths.items():
        if path not in adapters or file.settings.get("peft_type") != "LORA":
            continue
        pairs = {p: adapters.pop(p, {}) for p in (path, path + _INSIDE)}
        whole = _whole(file, path)
        _check_version(file.settings.get("peft_version"))
        _check_shapes(pairs, whole.r, width)
        configs = _configs_in(file.metadata, path, whole)
        adapters |= _unpacked(path, pairs, {name: config.r for name, config in configs.items()})
        ranks |= {peft.exactly(f"{path}.{name}"): config.r for name, config in configs.items()}
        alphas |= {peft.exactly(f"{path}.{name}"): config.alpha for name, config in configs.items()}
    if not ranks:
        return file
    settings = dict(file.settings)
    settings["rank_pattern"] = ranks | (settings.get("rank_pattern") or {})
    settings["alpha_pattern"] = alphas | (settings.get("alpha_pattern") or {})
    settings["target_modules"] = _targets(settings.get("target_modules"), widths, adapters)
    return replace(file, settings=settings, adapters=adapters)


def _whole(file: AdapterFile, path: str) -> LoRAConfig:
    config = peft.from_peft(file.settings, [path])[path]
    if not isinstance(config, LoRAConfig):
        raise AdapterError(f"it has {config.method} on the attention {path}, where PEFT has LoRA alone")
    return config


def _packed_config(path: str, configs: Mapping[str, AdapterConfig]) -> LoRAConfig:
    loras = {name: config for name, config in configs.items() if isinstance(config, LoRAConfig | LoRAFAConfig)}
    scales = sorted({config.scale for config in loras.values()})
    others = {name: config.method for name, config in configs.items() if name not in loras}
    if others:
        raise AdapterError(
            f"PEFT's format has LoRA alone on an attention, and {path} has {listing(sorted(set(others.values())))} on "
            f"{listing(others)}. merge(model) and save the model"
        )
    if len(scales) > 1:
        raise AdapterError(
            f"PEFT's format has one LoRA with one scaling for all of {path}, and {listing(configs)} have "
            f"{listing(map(str, scales))}. Give the projections of an attention equal alpha / r"
        )
    first = next(iter(loras.values()))
    rank = _rank({name: config.r for name, config in loras.items()})
    alpha = scales[0] * (math.sqrt(rank) if first.scaling == "rslora" else rank)
    return LoRAConfig(r=rank, alpha=alpha, dropout=first.dropout, scaling=first.scaling)


def _rank(ranks: Mapping[str, int]) -> int:
    return max(sum(ranks.get(name, 0) for name in _IN), ranks.get(_OUT, 0))


def _packed(path: str, tensors: Mapping[str, Tensors], width: int) -> dict[str, dict[str, Tensor]]:
    rank = _rank({name: len(pair["lora_A"]) for name, pair in tensors.items()})
    inner, outer = _stacked(tensors, _IN, rank, width), _stacked(tensors, (_OUT,), rank, width)
    return {path: inner, path + _INSIDE: outer | {_B: outer[_B] / _TIMES}}


def _stacked(tensors: Mapping[str, Tensors], names: Sequence[str], rank: int, width: int) -> dict[str, Tensor]:
    """Put the factors of ``names`` one below the other in ``A``, and along the diagonal in ``B``."""
    like = next(iter(tensors.values()))["lora_A"].detach()
    lora_A, lora_B = like.new_zeros(rank, width), like.new_zeros(len(names) * width, rank)
    row = 0
    for index, name in enumerate(names):
        if name in tensors:
            down, up = tensors[name]["lora_A"].detach(), tensors[name]["lora_B"].detach()
            lora_A[row : row + len(down)] = down
            lora_B[index * len(up) : (index + 1) * len(up), row : row + len(down)] = up
            row += len(down)
    return {_A: lora_A, _B: lora_B}


def _unpacked(path: str, pairs: Mapping[str, Tensors], ranks: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """Inverse of :func:`_packed` for adapters of these ranks; four of the full rank are PEFT's own."""
    (lora_A, lora_B), (out_A, out_B) = ((pair[_A], pair[_B]) for pair in pairs.values())
    if sum(ranks.get(name, 0) for name in _IN) > len(lora_A):
        ups = dict(zip(_IN, lora_B.chunk(3), strict=True)) | {_OUT: out_B * _TIMES}
        return {f"{path}.{name}": {_A: out_A if name == _OUT else lora_A, _B: up} for name, up in ups.items()}
    found, row = {}, 0
    for name, up in zip(_IN, lora_B.chunk(3), strict=True):
        if name in ranks:
            rows = slice(row, row + ranks[name])
            found[name] = {"lora_A": lora_A[rows], "lora_B": up[:, rows]}
            row = rows.stop
    if _OUT in ranks:
        found[_OUT] = {"lora_A": out_A[: ranks[_OUT]], "lora_B": out_B[:, : ranks[_OUT]] * _TIMES}
    again = _packed(path, found, lora_A.shape[1])
    # Of a file whose tensors are not read yet there are only shapes.
    if not lora_A.is_meta and not all(
        torch.equal(again[layer][leaf], pairs[layer][leaf]) for layer in pairs for leaf in (_A, _B)
    ):
        raise AdapterError(f"the tensors of {path} are not the ones its header describes: they have other blocks")
    return {f"{path}.{name}": {_A: pair["lora_A"], _B: pair["lora_B"]} for name, pair in found.items()}


def _configs_in(metadata: Mapping[str, Any] | None, path: str, whole: LoRAConfig) -> dict[str, LoRAConfig]:
    """The configs of the adapters that ``whole`` was packed from, or four like it where the header names none."""
    names = [name for name in PROJECTIONS if f"{path}.{name}" in (metadata or {}).get("targets", ())]
    if metadata is None or not names:
        return dict.fromkeys(PROJECTIONS, whole)
    try:
        found = {
            name: replace(whole, **{key: _of(metadata[key], f"{path}.{name}") for key in ("r", "alpha")})
            for name in names
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"the header does not say what the adapters on {path} are ({error!r})") from None
    if _packed_config(path, found) != whole:
        raise AdapterError(
            f"the config and the header of the weights disagree on {path}: r={whole.r}, alpha={whole.alpha:g} against "
            f"{found}. One was changed, or they are of two saves"
        )
    return found


def _of(value: Any, layer: str) -> Any:
    return value[layer] if isinstance(value, dict) else value


def _targets(targets: Any, attentions: Iterable[str], adapters: Iterable[str]) -> Any:
    """Name the projections of each attention that a list of targets names."""
    if not isinstance(targets, list):
        return targets
    named = [path for path in attentions if peft.fits(path, targets)]
    inside = {path: [f"{path}.{name}" for name in PROJECTIONS] for path in named}
    held = {path: [name for name in names if name in adapters] for path, names in inside.items()}
    return [*targets, *(name for path in named for name in held[path] or inside[path])]


def _check_shapes(pairs: Mapping[str, Tensors], rank: int, width: int) -> None:
    for (path, pair), outputs in zip(pairs.items(), (3 * width, width), strict=True):
        for leaf, shape in ((_A, (rank, width)), (_B, (outputs, rank))):
            found = tuple(pair[leaf].shape) if leaf in pair else "no such tensor"
            if found != shape:
                raise AdapterError(f"{path}.{leaf} has shape {found}, expected {shape} for r={rank}")


def _check_version(version: object) -> None:
    numbers = [tuple(map(int, re.findall(r"\d+", str(v))[:3])) for v in (version or PEFT_VERSION, PEFT_VERSION)]
    if numbers[0] > numbers[1]:
        raise AdapterError(
            f"it was written by PEFT {version}, and up to {PEFT_VERSION} the update of an attention's out_proj counts "
            "twice (huggingface/peft#3774). Whether it still does is not known here, so it is not loaded"
        )


def _require_one_size(path: str, attention: SplitAttention) -> None:
    if attention.in_proj_weight is None:
        raise AdapterError(
            f"{path} takes keys or values of another size (kdim, vdim), where PEFT has no adapters, so its format "
            "cannot hold this one. merge(model) and save the model"
        )


def _around(path: str) -> str:
    return path.rpartition(".")[0]


def _attentions(model: nn.Module) -> dict[str, SplitAttention]:
    return {canonical(path): module for path, module in model.named_modules() if isinstance(module, SplitAttention)}
