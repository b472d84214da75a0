"""The callback's arguments, from what people and YAML write to one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.model.biases import TRAIN_BIAS
from lightning_lora.model.targets import ALL_LINEAR, as_patterns
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.dora import DoRAConfig
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.vera import VeRAConfig
from lightning_lora.optim.swaps import FOR_FULL_TRAINING, SWAPS, AnySwap
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.edges import check_embeddings
from lightning_lora.quantization.formats import CONFIGS

METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config for config in (LoRAConfig, DoRAConfig, LoRAFAConfig, VeRAConfig)
}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(LoRAConfig)}
"""The callback's arguments that a method may have, and what they are unless given."""
BASELINES = ("freeze", "full")
"""Methods without adapters, to compare with: some modules trained and the rest frozen, or everything trained."""
EVA_BATCHES = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a module is turned into: where adapters go, what they are, and how the base below them is stored.

    Attributes:
        method: ``"lora"``, or one of :data:`BASELINES`, which have no targets, config, quantization or adapter.
        targets: Pattern or patterns, or a mapping from pattern to config.
        config: The config of targets that have none of their own.
        exclude: Patterns of layers to leave as they are.
        train: Patterns of modules to train whole.
        train_bias: Biases to train: of no, of adapted or of all layers.
        quantization: How to store the base; None leaves it as it is.
        embeddings: How to store embeddings and output heads beside it; None leaves those without an adapter as they
            are.
        adapter: Folder of a saved adapter that brings its own targets and configs.
        eva_batches: How many batches adapters that start from data see at most.

    Raises:
        TypeError: If ``eva_batches`` is no integer.
        ValueError: If ``adapter`` stands beside a value it would overrule, ``init="loftq"`` or ``embeddings`` beside no
            quantization, or a baseline beside a value it has no use for; if ``eva_batches`` is below 1, or nothing has
            ``init="eva"``.
    """

    method: str = "lora"
    targets: Any
    config: AdapterConfig
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    train_bias: str = "none"
    quantization: QuantizationConfig | None = None
    embeddings: str | None = None
    adapter: str | PathLike[str] | None = None
    eva_batches: int = EVA_BATCHES

    def __post_init__(self) -> None:
        check_choice("train_bias", self.train_bias, TRAIN_BIAS)
        check_embeddings(self.embeddings)
        if not isinstance(self.eva_batches, int) or isinstance(self.eva_batches, bool):
            raise TypeError(f"eva_batches must be an integer, got {self.eva_batches!r}")
        if self.eva_batches < 1:
            raise ValueError(f"eva_batches must be at least 1, got {self.eva_batches}")
        if self.eva_batches != EVA_BATCHES and not self.starts_from_data:
            raise ValueError(f"eva_batches={self.eva_batches} is for init='eva', which nothing has; drop it")
        if self.has_adapters:
            self._check_adapters()
        else:
            self._check_baseline()

    def _check_adapters(self) -> None:
        if self.quantization is None and self._starts_from("quantization"):
            raise ValueError(
                "init='loftq' fits the adapters to a base that is being quantized, and quantization is None. Use "
                "quantization='nf4', or init='pissa'"
            )
        if self.quantization is None and self.embeddings is not None:
            raise ValueError(
                f"embeddings={self.embeddings!r} stores embeddings and output heads in few bits beside a quantized "
                "base, and quantization is None. Use quantization='int8', or 'nf4'"
            )
        changed = [*self._changed(), *(["train"] if self.train else [])]
        if self.adapter is not None and changed:
            raise ValueError(f"adapter={str(self.adapter)!r} brings its own {listing(changed)}; drop these arguments")

    def _check_baseline(self) -> None:
        unused = ("quantization", "embeddings", "adapter")
        changed = self._changed() + [name for name in unused if getattr(self, name) is not None]
        if changed:
            raise ValueError(
                f"method={self.method!r} puts no adapters into the module and quantizes nothing, so it has no use for "
                f"{listing(changed)}; drop these arguments"
            )
        if self.method == "freeze" and not self.train:
            raise ValueError(
                "method='freeze' trains what train= names and nothing else; name a module, e.g. train='head'"
            )

    def _changed(self) -> list[str]:
        """What of an adapter is not as it is by default."""
        default = as_config(self.config.method, **DEFAULTS)
        changed = [f.name for f in fields(self.config) if getattr(self.config, f.name) != getattr(default, f.name)]
        changed += ["method"] if self.config.method != "lora" else []
        changed += ["exclude"] if self.exclude else []
        changed += ["train_bias"] if self.train_bias != "none" else []
        return changed + (["targets"] if self.targets != ALL_LINEAR else [])

    def _starts_from(self, what: str) -> bool:
        configs = [self.config, *(self.targets.values() if isinstance(self.targets, Mapping) else ())]
        return any(isinstance(config, LowRankConfig) and config.starts_from == what for config in configs)

    @property
    def starts_from_data(self) -> bool:
        """Whether there are adapters that start in directions of the layers' inputs."""
        return self._starts_from("data")

    @property
    def has_adapters(self) -> bool:
        """Whether the method puts adapters into the module."""
        return self.method not in BASELINES


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise ``ValueError`` naming the choices unless ``value`` is one."""
    if value not in list(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is True or False: any text would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def check_folder(name: str, value: object) -> None:
    """Raise unless ``value`` is a path or None; ``""`` would be the folder the program happens to be in."""
    if value is not None and not isinstance(value, str | PathLike):
        raise TypeError(f"{name} must be a path or None, got {value!r} ({type(value).__name__})")
    if value == "":
        raise ValueError(f'{name} is empty; name a folder ("." is the current one), or None')


def as_quantization(value: str | QuantizationConfig | None, method: str) -> QuantizationConfig | None:
    """A storage by name, or as its config; ``"auto"`` is NF4 under adapters."""
    if value == "auto":
        value = None if method in BASELINES else "nf4"
    if value is None or (not isinstance(value, str) and type(value) in CONFIGS.values()):
        return value
    if value not in list(CONFIGS):
        raise ValueError(
            f"quantization must be one of auto, {', '.join(CONFIGS)}, None (plain LoRA), or a config such as "
            f"NF4Config(), got {value!r}"
        )
    return CONFIGS[str(value)]()


def as_swap(value: str | Mapping[str, Any] | AnySwap | None, method: str) -> AnySwap | None:
    """What Adam and AdamW become: by name, as its value, or as YAML gives it, ``{"name": "badam", "order": ...}``.

    Raises:
        ValueError: If there is none of that name, or it is for full training and the method another.
        TypeError: If a value has no such field.
    """
    if value is None:
        return None
    swap = value if type(value) in SWAPS.values() else None
    if swap is None:
        given = dict(value) if isinstance(value, Mapping) else {"name": value}
        name = given.pop("name", None)
        check_choice("optimizer", name, SWAPS)
        unknown = sorted(set(given) - {field.name for field in fields(SWAPS[str(name)])})
        if unknown:
            known = listing(field.name for field in fields(SWAPS[str(name)])) or "none"
            raise ValueError(f"optimizer {name!r} has no {listing(unknown)}; its fields are {known}")
        swap = SWAPS[str(name)](**given)
    if isinstance(swap, FOR_FULL_TRAINING) and method != "full":
        raise ValueError(
            f"optimizer={swap.name!r} saves memory where whole matrices are trained, and method={method!r} does not. "
            "Use method='full', or optimizer='paged_adamw_8bit'"
        )
    assert isinstance(swap, AnySwap)
    return swap


def as_config(method: str, **values: Any) -> AdapterConfig:
    """Return the config of a method, from the callback's arguments; without adapters, that of LoRA.

    Raises:
        ValueError: If there is no such method, or it has no field for an argument that was given.
    """
    check_choice("method", method, (*METHODS, *BASELINES))
    kind = METHODS.get(method, LoRAConfig)
    has = [field.name for field in fields(kind)]
    foreign = [f"{name}={value!r}" for name, value in values.items() if name not in has and value != DEFAULTS[name]]
    if foreign:
        raise ValueError(f"method={method!r} does not have {listing(foreign)}; it has {', '.join(has)}")
    return kind(**{name: value for name, value in values.items() if name in has})


def with_configs(targets: Any, config: AdapterConfig) -> Any:
    """Turn the dicts of a target mapping (as YAML gives them) into configs; other fields are the callback's."""
    if not isinstance(targets, Mapping):
        return targets if isinstance(targets, str) else as_patterns(targets, "targets")
    base = {field.name: getattr(config, field.name) for field in fields(config)}
    made = {}
    for pattern, value in targets.items():
        unknown = sorted(set(value) - set(base)) if isinstance(value, Mapping) else []
        if unknown:
            raise ValueError(f"targets[{pattern!r}] has {listing(unknown)}; fields are {', '.join(base)}")
        made[pattern] = type(config)(**{**base, **value}) if isinstance(value, Mapping) else value
    return made
