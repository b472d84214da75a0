"""The callback's arguments, from what people and YAML write to frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.quantization.config import NF4Config

METHODS: dict[str, type[LoRAConfig]] = {"lora": LoRAConfig}
QUANTIZATIONS: dict[str, NF4Config] = {"nf4": NF4Config()}
OPTIMIZERS = ("paged_adamw_8bit",)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the choices unless ``value`` is one."""
    if value not in list(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def as_tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern, or several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def as_quantization(value: str | NF4Config | None) -> NF4Config | None:
    """A storage by name, or as its config."""
    if value is None or isinstance(value, NF4Config):
        return value
    check_choice("quantization", value, QUANTIZATIONS)
    return QUANTIZATIONS[value]


def with_configs(targets: Any, config: LoRAConfig) -> Any:
    """Turn the dicts of a target mapping (as YAML gives them) into configs; other fields are the callback's."""
    if not isinstance(targets, Mapping):
        return targets if isinstance(targets, str) else tuple(targets)
    base = {field.name: getattr(config, field.name) for field in fields(config)}
    made = {}
    for pattern, value in targets.items():
        unknown = sorted(set(value) - set(base)) if isinstance(value, Mapping) else []
        if unknown:
            raise ValueError(f"targets[{pattern!r}] has {listing(unknown)}; fields are {', '.join(base)}")
        made[pattern] = type(config)(**{**base, **value}) if isinstance(value, Mapping) else value
    return made
