"""``adapter_config.json`` in PEFT's format, to and from our configs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lora.errors import AdapterError, listing
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.dora import DoRAConfig
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.vera import VeRAConfig

MAX_CONFIG_BYTES = 1_000_000

_SHARED: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "revision": None,
    "task_type": None,
}
_FORMATS = {"lora": "LoRA", "lora_fa": "LoRA", "dora": "DoRA", "vera": "VeRA"}
"""What PEFT calls each method. LoRA-FA is, to a reader, LoRA; our header tells which."""
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_ELSEWHERE = "Load it with PEFT, merge_and_unload(), and go on from the merged model"


def to_peft(
    configs: Mapping[str, AdapterConfig],
    *,
    names: Iterable[str],
    parameters: Iterable[str] = (),
    train: Iterable[str] = (),
    bias: str = "none",
    transposed: bool = False,
) -> dict[str, Any]:
    """Return PEFT's config for adapters by layer.

    Args:
        configs: Config of each adapted layer, by its name.
        names: Names of every module of the model, which decide how briefly the targets can be named.
        parameters: Names of parameters that may be among the layers.
        train: Modules trained whole.
        bias: Which biases are trained: ``"none"``, ``"adapted"`` or ``"all"``.
        transposed: Whether a layer stores its weight transposed, as Hugging Face's ``Conv1D``.

    Raises:
        AdapterError: If the format cannot say it: methods, dropout or scaling that differ between layers, or a method
            it does not have.
    """
    check_one_method({path: config.method for path, config in configs.items()})
    veras = {path: config for path, config in configs.items() if isinstance(config, VeRAConfig)}
    low_rank = {path: config for path, config in configs.items() if isinstance(config, LowRankConfig)}
    stacks = sorted(configs.keys() & set(parameters))
    named = {"target_parameters": stacks} if stacks else {}
    return {
        **_SHARED,
        **(_vera_settings(veras) if veras else _low_rank_settings(low_rank)),
        "bias": ("vera_only" if veras else "lora_only") if bias == "adapted" else bias,
        "fan_in_fan_out": transposed,
        **named,
        "target_modules": _target_modules(sorted(configs.keys() - set(stacks)), names),
        "modules_to_save": sorted(train) or None,
    }


def check_supported(settings: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` if a setting changes the function in a way not supported."""
    kind = settings.get("peft_type")
    if kind not in ("LORA", "VERA"):
        raise AdapterError(f"peft_type is {kind!r:.80}, expected 'LORA' or 'VERA'. {_ELSEWHERE}")
    on = [f"{key}={settings[key]!r:.80}" for key in _MUST_BE_OFF if settings.get(key)]
    on += ["target_parameters, which VeRA has not"] if kind == "VERA" and settings.get("target_parameters") else []
    if on:
        raise AdapterError(f"it uses {listing(on)}, which cannot be loaded yet. {_ELSEWHERE}")


def check_complete(settings: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` if a setting is missing, or is nothing that PEFT writes."""
    kind = str(settings["peft_type"])
    biases = ("none", "all", f"{kind.lower()}_only")
    if settings.get("bias", "none") not in biases:
        raise AdapterError(f"bias is {settings['bias']!r:.80}, expected one of {', '.join(biases)}")
    missing = [key for key in (("r", "lora_alpha") if kind == "LORA" else ("r",)) if key not in settings]
    if missing:
        raise AdapterError(f"{listing(missing)} is missing; without it the adapter would be scaled wrongly")
    targets = settings.get("target_modules")
    if targets is not None and not isinstance(targets, list | str):
        raise AdapterError(f"target_modules is {targets!r:.80}, expected a list of names")
    whole = settings.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) and name for name in whole):
        raise AdapterError(f"modules_to_save is {whole!r:.80}, expected a list of names")


def from_peft(
    settings: Mapping[str, Any], layers: Iterable[str], metadata: Mapping[str, Any] | None = None
) -> dict[str, LowRankConfig]:
    """Return our config of each layer with an update of low rank.

    Args:
        settings: The parsed ``adapter_config.json``.
        layers: Names of the adapted layers, as the tensors have them.
        metadata: What our header says; from it alone LoRA-FA is told from LoRA.

    Raises:
        AdapterError: If a setting is missing, broken, or changes the function in a way not supported.
    """
    check_supported(settings)
    check_complete(settings)
    ranks, alphas = (_patterns(settings, key) for key in ("rank_pattern", "alpha_pattern"))
    try:
        return {
            path: _method(settings, path, metadata or {})(
                r=_lookup(ranks, path, settings["r"]),
                alpha=_lookup(alphas, path, settings["lora_alpha"]),
                dropout=dropout_in(settings),
                scaling="rslora" if settings.get("use_rslora") else "standard",
            )
            for path in layers
        }
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{error!s:.300}") from None


def dropout_in(settings: Mapping[str, Any]) -> float:
    """The dropout of all layers, under the name that the method has for it."""
    return settings.get("vera_dropout" if settings["peft_type"] == "VERA" else "lora_dropout") or 0.0


def expected_layers(settings: Mapping[str, Any], linear: Iterable[str]) -> set[str] | None:
    """Which of a model's linear layers the config says are adapted, or None where it does not say so by names."""
    targets = settings.get("target_modules")
    narrowed = any(settings.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if narrowed or not isinstance(targets, list):
        return None
    return {name for name in linear if fits(name, targets)}


def fits(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT's list of targets names a layer: by its name or the end of it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def exactly(path: str) -> str:
    """A ``rank_pattern`` key for one layer. PEFT lets any prefix stand before a key; the ``^`` forbids it."""
    return f"^{re.escape(path)}"


def dump(settings: Mapping[str, Any]) -> bytes:
    """Serialize with sorted keys: the same bytes for the same adapter."""
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def parse(data: bytes) -> dict[str, Any]:
    """Parse ``adapter_config.json``.

    Raises:
        AdapterError: If it is not a JSON object of at most 1 MB.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"it has {len(data):,} bytes, more than any adapter config ({MAX_CONFIG_BYTES:,})")
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"it is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise AdapterError(f"it holds a {type(settings).__name__}, expected an object")
    return settings


def check_one_method(method_of: Mapping[str, str]) -> None:
    """Raise ``AdapterError`` unless the layers, given with the method of each, have one that the format knows."""
    methods: dict[str, list[str]] = {}
    for path, method in method_of.items():
        methods.setdefault(_FORMATS.get(method, method), []).append(path)
    unknown = sorted(set(methods) - set(_FORMATS.values()))
    if unknown:
        raise AdapterError(
            f"PEFT's format has no method {listing(map(repr, unknown))}, which is on {listing(methods[unknown[0]])}. "
            "merge(model) and save the model"
        )
    if len(methods) > 1:
        found = "; ".join(f"{method} on {listing(paths, 3)}" for method, paths in sorted(methods.items()))
        raise AdapterError(
            f"PEFT's format has one method for all layers, and this adapter has {found}. Give each method an adapter "
            "of its own (inject(..., name=...)) and save them one by one, or merge(model) and save the model"
        )


def _check_one_value(configs: Mapping[str, AdapterConfig], *fields: str) -> None:
    for field in fields:
        values = sorted({str(getattr(config, field)) for config in configs.values()})
        if len(values) > 1:
            raise AdapterError(
                f"PEFT's format has one {field} for all layers, this adapter has {listing(values)}. Give them one "
                f"{field}, or put them into adapters of their own (inject(..., name=...)) and save them one by one"
            )


def _low_rank_settings(configs: Mapping[str, LowRankConfig]) -> dict[str, Any]:
    _check_one_value(configs, "dropout", "scaling")
    rank = _most_common(config.r for config in configs.values())
    alpha = _most_common(float(config.alpha) for config in configs.values())
    first = next(iter(configs.values()))
    return {
        "peft_type": "LORA",
        "init_lora_weights": True,
        "use_dora": isinstance(first, DoRAConfig),
        "use_rslora": first.scaling == "rslora",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": float(first.dropout),
        "rank_pattern": {exactly(path): config.r for path, config in sorted(configs.items()) if config.r != rank},
        "alpha_pattern": {
            exactly(path): _plain(config.alpha)
            for path, config in sorted(configs.items())
            if float(config.alpha) != alpha
        },
    }


def _vera_settings(configs: Mapping[str, VeRAConfig]) -> dict[str, Any]:
    _check_one_value(configs, "dropout")
    first = configs[min(configs)]
    return {
        "peft_type": "VERA",
        "init_weights": True,
        "save_projection": True,
        "projection_prng_key": first.seed,
        "r": first.r,
        "vera_dropout": float(first.dropout),
        "d_initial": first.d_initial,
    }


def _method(settings: Mapping[str, Any], path: str, metadata: Mapping[str, Any]) -> type[LowRankConfig]:
    if settings.get("use_dora"):
        return DoRAConfig
    named = metadata.get("method")
    named = named.get(path) if isinstance(named, dict) else named
    return LoRAFAConfig if named == LoRAFAConfig.method else LoRAConfig


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(alpha: float) -> int | float:
    """``lora_alpha`` is an integer in files by PEFT; keep it one where it is."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _target_modules(paths: list[str], names: Iterable[str]) -> list[str] | str:
    """The briefest way to name exactly these layers: last segments, whole names, or an anchored expression."""
    names = list(names)
    for targets in (sorted({path.rpartition(".")[2] for path in paths}), paths):
        if sorted(name for name in names if fits(name, targets)) == paths:
            return targets
    return "|".join(re.escape(path) for path in paths)


def _patterns(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Pattern keys as plain names. Expressions from a file are never run: a crafted one can hang the reader."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{key} is {patterns!r:.80}, expected an object")
    plain = {}
    for pattern, value in patterns.items():
        name = pattern.replace("\\", "")
        if re.fullmatch(r"\^?[\w.\-]+", name) is None:
            raise AdapterError(f"{key} has the expression {pattern!r:.80}; only names of layers can be read")
        plain[name] = value
    return plain


def _lookup(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if (path == pattern[1:]) if pattern.startswith("^") else fits(path, [pattern]):
            return value
    return default
