"""The callback's arguments, from what people and YAML write to one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.model.biases import TRAIN_BIAS
from lightning_lora.model.targets import ALL_LINEAR
from lightning_lora.nn.dora import DoRAConfig
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.vera import VeRAConfig
from lightning_lora.quantization.config import NF4Config

Config = LowRankConfig | VeRAConfig
METHODS: dict[str, type[Config]] = {
    config.method: config for config in (LoRAConfig, DoRAConfig, LoRAFAConfig, VeRAConfig)
}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(LoRAConfig)}
"""The callback's arguments that a method may have, and what they are unless given."""
QUANTIZATIONS: dict[str, NF4Config] = {"nf4": NF4Config()}
OPTIMIZERS = ("paged_adamw_8bit",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a module is turned into: where adapters go, what they are, and how the base below them is stored.

    Attributes:
        targets: Pattern or patterns, or a mapping from pattern to config.
        config: The config of targets that have none of their own.
        exclude: Patterns of layers to leave as they are.
        train: Patterns of modules to train whole.
        train_bias: Biases to train: of no, of adapted or of all layers.
        quantization: How to store the base; None leaves it as it is.
        adapter: Folder of a saved adapter that brings its own targets and configs.

    Raises:
        ValueError: If ``adapter`` stands beside a value it would overrule, or ``init="loftq"`` beside no quantization.
    """

    targets: Any
    config: Config
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    train_bias: str = "none"
    quantization: NF4Config | None = None
    adapter: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_choice("train_bias", self.train_bias, TRAIN_BIAS)
        configs = [self.config, *(self.targets.values() if isinstance(self.targets, Mapping) else ())]
        if self.quantization is None and any(config.starts_from == "quantization" for config in configs):
            raise ValueError(
                "init='loftq' fits the adapters to a base that is being quantized, and quantization is None. Use "
                "quantization='nf4', or init='pissa'"
            )
        if self.adapter is None:
            return
        default = as_config(self.config.method, **DEFAULTS)
        changed = [f.name for f in fields(self.config) if getattr(self.config, f.name) != getattr(default, f.name)]
        changed += ["method"] if self.config.method != "lora" else []
        changed += [name for name in ("exclude", "train") if getattr(self, name)]
        changed += ["train_bias"] if self.train_bias != "none" else []
        changed += ["targets"] if self.targets != ALL_LINEAR else []
        if changed:
            raise ValueError(f"adapter={str(self.adapter)!r} brings its own {listing(changed)}; drop these arguments")


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


def as_config(method: str, **values: Any) -> Config:
    """Return the config of a method, from the callback's arguments.

    Raises:
        ValueError: If there is no such method, or it has no field for an argument that was given.
    """
    check_choice("method", method, METHODS)
    has = [field.name for field in fields(METHODS[method])]
    foreign = [f"{name}={value!r}" for name, value in values.items() if name not in has and value != DEFAULTS[name]]
    if foreign:
        raise ValueError(f"method={method!r} does not have {listing(foreign)}; it has {', '.join(has)}")
    return METHODS[method](**{name: value for name, value in values.items() if name in has})


def with_configs(targets: Any, config: Config) -> Any:
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
