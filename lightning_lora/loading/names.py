"""Which tensor of the files belongs where in a model: names as they are, renamed, or all one level up or down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.errors import LoadError, listing
from lightning_lora.io.keys import canonical
from lightning_lora.io.notes import tell

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""Beginnings of names in the files with what takes their place, or a function of a name; None leaves a tensor out."""


@dataclass(frozen=True)
class Place:
    """One tensor of a model, under all the names that are tied to it.

    Attributes:
        names: As the model has them.
        outline: The tensor itself, for shape and dtype.
        required: Whether it has to be in the files; buffers that a state dict leaves out need not be.
    """

    names: tuple[str, ...]
    outline: Tensor
    required: bool


def places(model: nn.Module) -> list[Place]:
    """Return the places of a model, in its order.

    Raises:
        LoadError: If it has a state that is no tensor.
    """
    state = model.state_dict(keep_vars=True)
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise LoadError(f"{listing(foreign)} is a state that is no tensor, which safetensors files cannot hold")
    buffers = dict(model.named_buffers(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    found = state | buffers
    for name, value in found.items():
        tied.setdefault(id(value), []).append(name)
    return [Place(tuple(names), found[names[0]], any(name in state for name in names)) for names in tied.values()]


def match(
    model: nn.Module, places: Iterable[Place], outline: Mapping[str, Tensor], rename: Rename | None, where: object
) -> dict[Place, tuple[str, ...]]:
    """Return the names in the files for each place that has any.

    Args:
        model: For its name in errors.
        places: Of the model.
        outline: Meta tensors by their names in the files.
        rename: What to make of those names first.
        where: The files, for errors.

    Raises:
        LoadError: If a place has no tensor, a tensor no place, or another shape or kind of numbers than that.
        ValueError: If part of ``rename`` matches nothing, or two tensors end with one name.
    """
    places = list(places)
    renamed = _renamed(outline, rename)
    found = _fitted(places, renamed)
    if found is None:
        raise LoadError(
            f"{where} does not fit {type(model).__name__}: {_misfit(places, renamed)}. Load the part of the model that "
            "the files hold, or say what their names are here: "
            "rename={'beginning in the files': 'beginning in the model', 'not wanted': None}"
        )
    _check_tensors(found, outline, where)
    return found


def match_exactly(
    model: nn.Module, places: Iterable[Place], outline: Mapping[str, Tensor], where: object
) -> dict[Place, tuple[str, ...]]:
    """Return the same for files whose names have to be those of the model.

    Raises:
        LoadError: As :func:`match`.
    """
    places, names = list(places), {name: name for name in outline}
    found = _placed(places, names)
    if found is None:
        raise LoadError(
            f"{where} does not fit {type(model).__name__}: {_misfit(places, names)}. Build the model as it was saved"
        )
    _check_tensors(found, outline, where)
    return found


def _renamed(names: Iterable[str], rename: Rename | None) -> dict[str, str]:
    """The names in the files, by what they become."""
    names = list(names)
    change = _by_beginning(names, rename) if isinstance(rename, Mapping) else rename
    made: dict[str, str] = {}
    for name in names:
        new = name if change is None else change(name)
        if new is None:
            continue
        if new in made:
            raise ValueError(f"rename makes {new!r} of both {made[new]!r} and {name!r}")
        made[new] = name
    return made


def _by_beginning(names: list[str], rename: Mapping[str, str | None]) -> Callable[[str], str | None]:
    idle = [old for old in rename if not any(name.startswith(old) for name in names)]
    if idle:
        raise ValueError(f"rename: no name in the files begins with {listing(map(repr, idle))}; {_some(names)}")

    def change(name: str) -> str | None:
        old = max((old for old in rename if name.startswith(old)), key=len, default=None)
        new = "" if old is None else rename[old]
        return None if new is None else new + name[len(old or "") :]

    return change


def _fitted(places: list[Place], names: Mapping[str, str]) -> dict[Place, tuple[str, ...]] | None:
    """The names in the files for each place: as they are, else all with one prefix more or less; None if none fits."""
    found = _placed(places, names)
    if found is not None:
        return found
    fitting = {}
    for what, moved in _moves(places, names):
        found = _placed(places, moved)
        if found is not None:
            fitting[what] = found
    if len(fitting) > 1:
        raise LoadError(
            f"the names in the files fit in several ways: {listing(fitting)}. Choose one with rename={{...}}"
        )
    for what, found in fitting.items():
        tell(f"load_base: {what}")
        return found
    return None


def _moves(places: Iterable[Place], names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every way to take one prefix off all names, or to put one before all of them, with what to say of it."""
    first = next(iter(names), "")
    for prefix in _prefixes(first):
        if all(name.startswith(prefix) for name in names):
            less = {name.removeprefix(prefix): old for name, old in names.items()}
            yield f"{prefix!r} is taken off every name in the files", less
    known = {canonical(name) for place in places for name in place.names}
    ends = sorted(name.removesuffix(first) for name in known if first and name.endswith(f".{first}"))
    for prefix in ends:
        yield f"{prefix!r} is put before every name in the files", {prefix + name: old for name, old in names.items()}


def _placed(places: Iterable[Place], names: Mapping[str, str]) -> dict[Place, tuple[str, ...]] | None:
    """The names in the files for each place, if every name has one and every place that needs one."""
    found, left = {}, set(names)
    for place in places:
        here = tuple(name for name in map(canonical, place.names) if name in left)
        left.difference_update(here)
        if here:
            found[place] = tuple(names[name] for name in here)
        elif place.required:
            return None
    return None if left else found


def _misfit(places: Iterable[Place], names: Mapping[str, str]) -> str:
    known = {canonical(name) for place in places for name in place.names}
    missing = [
        " or ".join(map(canonical, place.names))
        for place in places
        if place.required and not any(canonical(name) in names for name in place.names)
    ]
    extra = [name for name in names if name not in known]
    said = [f"it lacks {listing(missing)}"] * bool(missing) + [f"the model has no {listing(extra)}"] * bool(extra)
    return "; ".join(said)


def _check_tensors(found: Mapping[Place, tuple[str, ...]], outline: Mapping[str, Tensor], where: object) -> None:
    pairs = [(place, name) for place, names in found.items() for name in names]
    shapes = [
        f"{place.names[0]} is {tuple(outline[name].shape)} there and {tuple(place.outline.shape)} in the model"
        for place, name in pairs
        if outline[name].shape != place.outline.shape
    ]
    kinds = [
        f"{place.names[0]} is {outline[name].dtype} there and {place.outline.dtype} in the model"
        for place, name in pairs
        if not _alike(outline[name], place.outline)
    ]
    if shapes or kinds:
        raise LoadError(f"{where} holds another model: {listing([*shapes, *kinds])}")


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor can stand for another one: floats of any width, or the very same integers."""
    return (one.is_floating_point() and other.is_floating_point()) or one.dtype == other.dtype


def _prefixes(name: str) -> list[str]:
    return [name[: index + 1] for index, letter in enumerate(name) if letter == "."]


def _some(names: Iterable[str]) -> str:
    return f"the names there are {listing(names, 3)}"
