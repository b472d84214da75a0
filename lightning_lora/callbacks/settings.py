"""The callback's arguments, from what people and YAML write to one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.model.targets import ALL_LINEAR
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.quantization.config import NF4Config

METHODS: dict[str, type[LoRAConfig]] = {"lora": LoRAConfig}
BASELINES = ("freeze", "full")
"""Methods without adapters, to compare with: some modules trained and the rest frozen, or everything trained."""
QUANTIZATIONS: dict[str, NF4Config] = {"nf4": NF4Config()}
OPTIMIZERS = ("paged_adamw_8bit",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a module is turned into: where adapters go, what they are, and how the base below them is stored.

    Attributes:
        method: ``"lora"``, or one of :data:`BASELINES`, which have no targets, config, quantization or adapter.
        targets: Pattern or patterns, or a mapping from pattern to config.
        config: The config of targets that have none of their own.
        exclude: Patterns of layers to leave as they are.
        train: Patterns of modules to train whole.
        quantization: How to store the base; None leaves it as it is.
        adapter: Folder of a saved adapter that brings its own targets and configs.

    Raises:
        ValueError: If ``adapter`` stands beside a value it would overrule, or a baseline beside one it has no use for.
    """

    method: str = "lora"
    targets: Any
    config: LoRAConfig
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    quantization: NF4Config | None = None
    adapter: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        changed = [f.name for f in fields(LoRAConfig) if getattr(self.config, f.name) != f.default]
        changed += ["exclude"] if self.exclude else []
        changed += ["targets"] if self.targets != ALL_LINEAR else []
        if self.method in BASELINES:
            changed += [name for name in ("quantization", "adapter") if getattr(self, name) is not None]
            _check_baseline(self.method, changed, self.train)
        elif self.adapter is not None:
            changed += ["train"] if self.train else []
            if changed:
                raise ValueError(
                    f"adapter={str(self.adapter)!r} brings its own {listing(changed)}; drop these arguments"
                )

    @property
    def has_adapters(self) -> bool:
        """Whether the method puts adapters into the module."""
        return self.method not in BASELINES


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the choices unless ``value`` is one."""
    if value not in list(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def as_tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern, or several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def as_quantization(value: str | NF4Config | None, method: str) -> NF4Config | None:
    """A storage by name, or as its config; ``"auto"`` is NF4 under adapters."""
    if value == "auto":
        value = None if method in BASELINES else "nf4"
    if value is None or isinstance(value, NF4Config):
        return value
    check_choice("quantization", value, ("auto", *QUANTIZATIONS))
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


def _check_baseline(method: str, changed: list[str], train: tuple[str, ...]) -> None:
    if changed:
        raise ValueError(
            f"method={method!r} puts no adapters into the module and quantizes nothing, so it has no use for "
            f"{listing(changed)}; drop these arguments"
        )
    if method == "freeze" and not train:
        raise ValueError("method='freeze' trains what train= names and nothing else; name a module, e.g. train='head'")
