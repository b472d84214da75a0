"""From the user's words to a plan: which layers get which adapter. Pure; the model is read, never changed.

A pattern is a dotted suffix (``q_proj``, ``attn.q_proj``), a whole name, or either with shell wildcards
(``layers.*.q_proj``); ``*`` crosses dots, and ``[8-15]`` is a number from 8 to 15 (``layers.[8-15].*.q_proj``). The
projections of an ``nn.MultiheadAttention`` are layers of their own here: ``self_attn.q_proj``, ``k_proj``, ``v_proj``,
``out_proj``. Every pattern has to match something: a misspelt target that is silently skipped is a fine-tune of half
the model.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, runtime_checkable

from torch import nn

from lightning_lora.errors import TargetError, listing
from lightning_lora.model.biases import choose_biases
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.split import layer_at, module_around, named_layers, place_of
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.experts import StackedWeight
from lightning_lora.nn.kinds import has_kind, is_linear, kind_of, why_not_adaptable
from lightning_lora.nn.split import Split

ALL_LINEAR = "all-linear"

_RANGE = re.compile(r"\[(\d+)-(\d+)\]")
_PLACE = "\ue000"
"""A character that is in no name, for what comes in its place."""
_MOST_NUMBERS = 10_000

_KIND, _KINDS = "linear layer, embedding or convolution", "linear layers, embeddings and convolutions"

Targets = str | Iterable[str] | Mapping[str, AdapterConfig]


@dataclass(frozen=True)
class Plan:
    """What injection will do, decided and checked before anything is touched.

    Attributes:
        layers: Name of each linear layer to adapt, in the model's order, with its config.
        train: Names of modules trained whole.
        biases: Names of layers whose bias is trained.
        left: Linear layers that ``"all-linear"`` passed over, with the reason.
    """

    layers: Mapping[str, AdapterConfig]
    train: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class NamesItsHead(Protocol):
    """A model that says which layer its output head is, as those of Hugging Face transformers do."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head, or None."""


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted module name fits a pattern, as a whole or as a suffix that starts at a dot."""
    return _expression(pattern).match(name) is not None or _expression(f"*.{pattern}").match(name) is not None


@lru_cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression: wildcards as the shell has them, and ``[m-n]`` also for numbers of several digits."""
    ranges = _RANGE.findall(pattern)
    expression = fnmatch.translate(_RANGE.sub(_PLACE, pattern))
    for first, last in ranges:
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MOST_NUMBERS:
            raise TargetError(
                f"[{first}-{last}] in {pattern.removeprefix('*.')!r} holds no number, or more than {_MOST_NUMBERS:,}; "
                "write the smaller one first, as in 'layers.[8-15].*'"
            )
        expression = expression.replace(_PLACE, f"(?:{'|'.join(map(str, numbers))})", 1)
    return re.compile(expression)


def resolve(
    model: nn.Module,
    targets: Targets,
    config: AdapterConfig,
    *,
    exclude: Iterable[str] = (),
    train: Iterable[str] = (),
    train_bias: str = "none",
) -> Plan:
    """Decide which layers of ``model`` get which adapter.

    Args:
        model: Any module.
        targets: ``"all-linear"`` (every linear layer but the output head), a pattern, several, or a mapping from
            pattern to config in which later entries win. Patterns reach embeddings and convolutions too.
        config: Config for targets that do not bring their own.
        exclude: Patterns of layers to pass over.
        train: Patterns of modules to train whole, as they are, beside the adapters.
        train_bias: Biases to train: ``"none"``, ``"adapted"`` (of the layers that are adapted) or ``"all"``.

    Raises:
        TargetError: If a pattern matches nothing or no layer of a kind that can be adapted, if nothing is left to
            adapt, if a rank is above what a layer can have, if there is no bias to train.
        ValueError: If ``train_bias`` is none of the choices.
    """
    wanted = _as_mapping(targets, config)
    exclude, train = as_patterns(exclude, "exclude"), as_patterns(train, "train")
    candidates = _candidates(model)
    linear = {name: reason for name, reason in candidates.items() if _is_linear(layer_at(model, name))}
    if not candidates or (not linear and ALL_LINEAR in wanted):
        raise TargetError(f"{type(model).__name__} has no linear layer to adapt; {_inventory(model)}")
    trained = resolve_train(model, train)
    excluded = {
        name for pattern in exclude for name in _matching(model, candidates, pattern, "exclude", lambda _: None)
    }
    left: dict[str, str] = {}
    layers: dict[str, AdapterConfig] = {}
    for pattern, its_config in wanted.items():
        if pattern == ALL_LINEAR:
            left |= _passed_over(model, linear, trained)
            left |= dict.fromkeys(_stacks(model, candidates), "a stack of experts; name it to adapt it")
            found = [name for name in linear if name not in left]
        else:
            found = _matching(model, candidates, pattern, "target", candidates.get)
            _refuse_overlap(pattern, found, trained)
        layers |= dict.fromkeys((name for name in found if name not in excluded), its_config)
    if not layers:
        reasons = listing(
            [f"{name} ({why})" for name, why in left.items()] + [f"{name} (excluded)" for name in sorted(excluded)]
        )
        raise TargetError(f"nothing is left to adapt: {reasons}. Name a target outright, or exclude less")
    ordered = {name: layers[name] for name in candidates if name in layers}
    _check_shapes(model, ordered)
    return Plan(
        layers=ordered,
        train=trained,
        biases=choose_biases(model, train_bias, ordered, trained),
        left={name: why for name, why in left.items() if name not in ordered},
    )


def _as_mapping(targets: Targets, config: AdapterConfig) -> dict[str, AdapterConfig]:
    if isinstance(targets, Mapping):
        for pattern, value in targets.items():
            if not isinstance(value, AdapterConfig):
                raise TypeError(
                    f"targets[{pattern!r}] must be an adapter config such as LoRAConfig(r=8), got {value!r}"
                )
        wanted = dict(targets)
    elif not isinstance(config, AdapterConfig):
        raise TypeError(f"config must be an adapter config such as LoRAConfig(r=8), got {config!r}")
    else:
        wanted = dict.fromkeys(as_patterns(targets, "targets"), config)
    if not wanted:
        raise TargetError(f'targets is empty; pass "{ALL_LINEAR}" or the names of layers')
    return wanted


def as_patterns(patterns: str | Iterable[str], what: str) -> tuple[str, ...]:
    """Return one pattern, or several, as a tuple.

    Raises:
        TypeError: If they are anything else; ``what`` is the argument's name in the message.
    """
    if isinstance(patterns, AdapterConfig):
        raise TypeError(f"{what} must be a name or several, got {patterns!r}. A config has a name: {{name: config}}")
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{what} must be a name or several, got {patterns!r}")
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"{what} must be non-empty strings, got {pattern!r}")
    return patterns


def _candidates(model: nn.Module) -> dict[str, str | None]:
    """Every layer of a known kind by name, with the reason why it cannot be adapted, or None where it can."""
    hosted = adapted_layers(model)
    found: dict[str, str | None] = dict.fromkeys(hosted)
    inside = tuple(f"{name}." for name in hosted)
    for name, module in named_layers(model):
        if has_kind(module) and not (inside and name.startswith(inside)):
            found[name] = why_not_adaptable(module)
    order = {name: index for index, (name, _) in enumerate(named_layers(model))}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _is_linear(layer: nn.Module) -> bool:
    return layer.kind.name == "linear" if isinstance(layer, AdaptedLayer) else is_linear(layer)


def _matching(
    model: nn.Module, candidates: Mapping[str, str | None], pattern: str, what: str, reason: Callable[[str], str | None]
) -> list[str]:
    """Names of the layers a pattern matches; an error if there is none, or none that ``reason`` accepts."""
    found = [name for name in candidates if matches(name, pattern)]
    good = [name for name in found if reason(name) is None]
    if good:
        return good
    if found:
        raise TargetError(f"{what} {pattern!r} matches {listing(found)}, which cannot be adapted: {reason(found[0])}")
    second = {alias: name for alias, name in _second_names(model, candidates) if matches(alias, pattern)}
    if second:
        alias, name = next(iter(second.items()))
        raise TargetError(f"{what} {pattern!r} matches {alias}, a second name of {name}. Pass {name!r} for both places")
    others = [
        f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name and matches(name, pattern)
    ]
    if others:
        inner = f"{pattern}.*" if any(matches(name, f"{pattern}.*") for name in candidates) else None
        hint = f"Pass {inner!r} for the layers inside" if inner else f"Only {_KINDS} can be adapted"
        raise TargetError(f"{what} {pattern!r} matches no {_KIND}, only {listing(others)}. {hint}")
    endings = sorted({name.rpartition(".")[2] for name in candidates})
    close = difflib.get_close_matches(pattern.rpartition(".")[2], endings, n=3, cutoff=0.5)
    hint = f"Closest: {', '.join(close)}. " if close else ""
    raise TargetError(
        f"{what} {pattern!r} matches no {_KIND}. {hint}Such layers here end in: {listing(endings, 12)}. Pass "
        f"one of these, or a glob such as '*.{(close or endings)[0]}'"
    )


def _second_names(model: nn.Module, candidates: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Further names of layers inside of modules that stand in several places, with the name they go by."""
    first = {module: name for name, module in model.named_modules()}
    for alias, module in model.named_modules(remove_duplicate=False):
        name = first[module]
        inside = [layer for layer in candidates if f"{layer}.".startswith(f"{name}.")] if alias != name else []
        yield from ((alias + layer[len(name) :], layer) for layer in inside)


def resolve_train(model: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the modules that patterns match, the outermost where one is inside another.

    Raises:
        TargetError: If a pattern matches no module, or one without parameters.
    """
    names = [name for name, _ in model.named_modules() if name]
    trained: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in names if matches(name, pattern)]
        if not found:
            close = difflib.get_close_matches(pattern, sorted({n.rpartition(".")[2] for n in names} | set(names)), n=3)
            hint = f"Closest: {', '.join(close)}" if close else f"Modules here: {listing(names, 12)}"
            raise TargetError(f"train {pattern!r} matches no module. {hint}")
        for name in found:
            if next(model.get_submodule(name).parameters(), None) is None:
                raise TargetError(f"train {pattern!r} matches {name}, which has no parameters to train")
        trained |= dict.fromkeys(found)
    outer = tuple(f"{name}." for name in trained)
    return tuple(name for name in trained if not name.startswith(outer))


def _within(name: str, modules: Iterable[str]) -> str | None:
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)


def _passed_over(model: nn.Module, candidates: Mapping[str, str | None], trained: tuple[str, ...]) -> dict[str, str]:
    """What ``"all-linear"`` leaves as it is, and why."""
    left = {name: reason for name, reason in candidates.items() if reason is not None}
    left |= {name: "trained whole" for name in candidates if _within(name, trained)}
    adaptable = [name for name, reason in candidates.items() if reason is None]
    left |= dict.fromkeys(_output_heads(model, adaptable), "output head")
    return left


def _stacks(model: nn.Module, candidates: Iterable[str]) -> list[str]:
    return [name for name in candidates if isinstance(layer_at(model, name), StackedWeight)]


def output_heads(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that ``"all-linear"`` leaves because they are the model's output."""
    candidates = _candidates(model)
    linear = [name for name, why in candidates.items() if why is None and _is_linear(layer_at(model, name))]
    return _output_heads(model, linear)


def _output_heads(model: nn.Module, linear: list[str]) -> list[str]:
    """What the model itself calls its output head, else the last linear layer.

    A last layer inside a repeated block is no head, and a model of a single linear layer has no head to spare.
    """
    if len(linear) < 2:
        return []
    named = {id(m.get_output_embeddings()) for m in model.modules() if isinstance(m, NamesItsHead)} - {id(None)}
    heads = [name for name in linear if id(layer_at(model, name)) in named]
    last = linear[-1]
    in_block = re.search(r"(^|\.)\d+\.", last) is not None or _is_projection(model, last)
    return heads or ([] if named or in_block else [last])


def _is_projection(model: nn.Module, name: str) -> bool:
    around = model.get_submodule(name.rpartition(".")[0])
    return isinstance(around, Split) or place_of(model, name) != name


def _refuse_overlap(pattern: str, found: list[str], trained: tuple[str, ...]) -> None:
    for name in found:
        whole = _within(name, trained)
        if whole is not None:
            raise TargetError(
                f"target {pattern!r} matches {name}, but train={whole!r} trains that layer whole. Choose one of the two"
            )


def _check_shapes(model: nn.Module, layers: Mapping[str, AdapterConfig]) -> None:
    refused = {name: reason for name, config in layers.items() if (reason := _why_not(layer_at(model, name), config))}
    if refused:
        name, reason = next(iter(refused.items()))
        ending = name.rpartition(".")[2]
        like = [other for other in layers if matches(other, ending)]
        alike = len(like) > 1 and all(other in refused for other in like)
        more = f" ({len(refused)} layers in all)" if len(refused) > 1 else ""
        raise TargetError(f"{name}: {reason}, or exclude={(ending if alike else name)!r}{more}")


def _why_not(layer: nn.Module, config: AdapterConfig) -> str | None:
    try:
        kind = layer.kind if isinstance(layer, AdaptedLayer) else kind_of(layer)
        kind.check(config)
        config.check(kind)
    except ValueError as error:
        return str(error)
    return None


def refuse_tied(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse to adapt one of two layers that share a weight: quantizing or merging it would untie them.

    One module that stands in several places is one layer, and replaced in all of them.

    Raises:
        TargetError: Naming both.
    """
    places = {place_of(model, name): name for name in layers}
    owners: dict[int, dict[tuple[nn.Module, str], str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            replaced = (module_around(model, name) or module, key)
            owners.setdefault(id(parameter), {}).setdefault(replaced, f"{name}.{key}")
    for shared in owners.values():
        around = [place for name in shared.values() for place in _places_around(name)]
        mine = [places[place] for place in around if place in places]
        if len(shared) > 1 and mine:
            names = listing(shared.values())
            raise TargetError(
                f"{mine[0]} shares its weight with another layer ({names}): exclude={mine[0]!r}, or untie it first"
            )


def _places_around(parameter: str) -> tuple[str, str]:
    """What may be replaced together with a parameter: the module that holds it, or the one around that."""
    holder = parameter.rpartition(".")[0]
    return holder, holder.rpartition(".")[0]


def _inventory(model: nn.Module) -> str:
    kinds: dict[str, int] = {}
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            kinds[type(module).__name__] = kinds.get(type(module).__name__, 0) + 1
    found = listing([f"{count} {kind}" for kind, count in kinds.items()]) or "no parameters at all"
    return f"found {found}. If the layers are made later (configure_model, lazy modules), adapt the model after that"
