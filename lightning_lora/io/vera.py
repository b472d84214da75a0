"""VeRA in PEFT's format and out of it.

PEFT has one pair of projections for a whole model, of the size of its largest layer; every layer takes the first
columns of ``A`` and the first rows of ``B``. Here each size of layer has projections of its own, unless the config says
otherwise. They are written as one pair, of which each size uses a block of the rank, which is the same function:

    A = [A_1 0; A_2; ...]  (R_1 + R_2 + ..., I)      B = [B_1; 0 | B_2 | ...]  (O, R_1 + R_2 + ...)      d = [0 d_i 0]

The projections are in the file, because PEFT could not draw ours. Here they are drawn again and compared: around other
projections the vectors would be another function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError, listing
from lightning_lora.io.adapter_file import AGAIN, AdapterFile
from lightning_lora.io.keys import adapter_key, canonical
from lightning_lora.model.split import layer_at, named_layers
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import has_kind, kind_of
from lightning_lora.nn.vera import VeRAConfig, projection

Tensors = Mapping[str, Tensor]
PROJECTIONS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
_D, _B = "vera_lambda_d", "vera_lambda_b"


@dataclass(frozen=True)
class _Layout:
    """Which projections each layer multiplies with, and where in PEFT's pair they are.

    Attributes:
        configs: The config of each layer.
        kinds: The size of each layer.
    """

    configs: Mapping[str, VeRAConfig]
    kinds: Mapping[str, Kind]

    @property
    def columns(self) -> int:
        return max(self.kinds[path].in_features for path in self.configs)

    @property
    def rows(self) -> int:
        return max(self.kinds[path].out_features for path in self.configs)

    def blocks(self) -> dict[tuple[int, ...], slice]:
        """The rows of ``A`` that belong to each pair of projections."""
        found, row = {}, 0
        for pair in sorted({self._pair(path) for path in self.configs}):
            found[pair] = slice(row, row + pair[0])
            row += pair[0]
        return found

    def block(self, path: str) -> slice:
        """The elements of PEFT's ``d`` that are a layer's own."""
        return self.blocks()[self._pair(path)]

    def rank(self) -> int:
        """The rank of PEFT's pair."""
        return sum(block.stop - block.start for block in self.blocks().values())

    def projections(self) -> dict[str, Tensor]:
        """PEFT's pair, by factor."""
        blocks = self.blocks()
        A, B = torch.zeros(self.rank(), self.columns), torch.zeros(self.rows, self.rank())
        for (r, seed, columns, rows, sliced), block in blocks.items():
            pair = {"largest_in": columns, "largest_out": rows} if sliced else {}
            config = VeRAConfig(r=r, seed=seed, **pair)
            columns, rows = min(columns, self.columns), min(rows, self.rows)
            A[block, :columns] = projection(config, "A", columns, A.device, A.dtype)
            B[:rows, block] = projection(config, "B", rows, B.device, B.dtype)
        return {"A": A, "B": B}

    def _pair(self, path: str) -> tuple[int, ...]:
        config, kind = self.configs[path], self.kinds[path]
        sliced = config.largest_in is not None and config.largest_out is not None
        columns, rows = (config.largest_in, config.largest_out) if sliced else (kind.in_features, kind.out_features)
        return config.r, config.seed, columns or 0, rows or 0, int(sliced)


def pack_configs(model: nn.Module, configs: Mapping[str, AdapterConfig]) -> dict[str, AdapterConfig]:
    """Return the config of each layer as PEFT has them: every VeRA takes a part of the one pair of projections.

    Args:
        model: The model the adapters are in.
        configs: The config of each adapted layer, by its canonical name.
    """
    layout = _layout(model, configs)
    if layout is None:
        return dict(configs)
    whole = {"r": layout.rank(), "largest_in": layout.columns, "largest_out": layout.rows}
    return {**configs, **{path: replace(config, **whole) for path, config in layout.configs.items()}}


def pack_tensors(
    model: nn.Module, configs: Mapping[str, AdapterConfig], tensors: Mapping[str, Tensors]
) -> dict[str, Tensor]:
    """Return the vectors of all VeRAs, and their projections, by their on-disk names.

    Args:
        model: The model the adapters are in.
        configs: The config of each adapted layer, by its canonical name.
        tensors: The tensors of each adapted layer, by its name.
    """
    layout = _layout(model, configs)
    if layout is None:
        return {}
    packed = {PROJECTIONS[factor]: matrix for factor, matrix in layout.projections().items()}
    for path, vectors in ((canonical(path), vectors) for path, vectors in tensors.items()):
        if path in layout.configs:
            d = vectors[_D].new_zeros(layout.rank())
            d[layout.block(path)] = vectors[_D]
            packed |= {adapter_key(path, _D): d, adapter_key(path, _B): vectors[_B]}
    return packed


def unpacked(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return a file of VeRAs with the vectors as they are here, the config of each layer, and no projections.

    Raises:
        AdapterError: If the projections are not those that are drawn here, or a vector does not fit them.
    """
    if file.settings.get("peft_type") != "VERA":
        return file
    kinds = _kinds(model)
    strangers = [path for path in file.adapters if path in kinds and kinds[path].name != "linear"]
    if strangers:
        raise AdapterError(f"{listing(strangers)} is no linear layer in this model, and VeRA adapts no other")
    vectors = {path: tensors for path, tensors in file.adapters.items() if path in kinds}
    found = {factor: file.others[key] for factor, key in PROJECTIONS.items() if key in file.others}
    others = {key: tensor for key, tensor in file.others.items() if key not in PROJECTIONS.values()}
    if not vectors:  # which is an error of its own, told with what the model has
        return replace(file, others=others)
    _check_rank(file.settings["r"], vectors)
    layouts = [_Layout(configs, kinds) for configs in _candidates(file, vectors, kinds)]
    layout = _fitting(layouts, file.settings["r"], found)
    adapters = {**file.adapters, **{path: _own_part(path, vectors[path], layout) for path in vectors}}
    return replace(file, adapters=adapters, others=others, configs=layout.configs)


def unpacked_alone(file: AdapterFile) -> AdapterFile:
    """The same without the model. Its sizes say which elements of ``d`` are a layer's own; here all of them stay.

    Raises:
        AdapterError: If a vector is missing or of another size, or it is not said what the adapters are.
    """
    if file.settings.get("peft_type") != "VERA":
        return file
    lacking = [f"{path}.{_B}" for path, tensors in file.adapters.items() if _B not in tensors]
    if lacking:
        raise AdapterError(f"{listing(lacking)} is missing")
    _check_rank(file.settings["r"], file.adapters)
    shapes = [tuple(file.others[key].shape) for key in PROJECTIONS.values() if key in file.others]
    if any(len(shape) != 2 for shape in shapes):
        raise AdapterError(f"the projections have shapes {shapes}, expected matrices")
    size = (
        dict(zip(("largest_in", "largest_out"), (shapes[0][1], shapes[1][0]), strict=True)) if len(shapes) > 1 else {}
    )
    with _said_what():
        like, settings = _like(file.settings), file.settings
        configs = _configs_in_header(file, file.adapters) or dict.fromkeys(
            file.adapters, VeRAConfig(r=settings["r"], seed=settings.get("projection_prng_key", 0), **size, **like)
        )
    others = {key: tensor for key, tensor in file.others.items() if key not in PROJECTIONS.values()}
    return replace(file, others=others, configs=configs)


def _layout(model: nn.Module, configs: Mapping[str, AdapterConfig]) -> _Layout | None:
    veras = {path: config for path, config in sorted(configs.items()) if isinstance(config, VeRAConfig)}
    return _Layout(veras, _kinds(model)) if veras else None


def _kinds(model: nn.Module) -> dict[str, Kind]:
    layers = ((canonical(path), layer_at(model, path)) for path, _ in named_layers(model))
    return {
        path: layer.kind if isinstance(layer, AdaptedLayer) else kind_of(layer)
        for path, layer in layers
        if isinstance(layer, AdaptedLayer) or has_kind(layer)
    }


def _check_rank(rank: object, vectors: Mapping[str, Tensors]) -> None:
    for path, tensors in vectors.items():
        found = tuple(tensors[_D].shape) if _D in tensors else "no such tensor"
        if found != (rank,):
            raise AdapterError(f"{path}.{_D} has shape {found}, expected ({rank!r:.80},) for r={rank!r:.80}. {AGAIN}")


def _candidates(
    file: AdapterFile, vectors: Mapping[str, Tensors], kinds: Mapping[str, Kind]
) -> list[dict[str, VeRAConfig]]:
    """What the adapters may be: what the header says, or without one PEFT's own, or ours that PEFT has saved again."""
    settings = file.settings
    with _said_what():
        in_header = _configs_in_header(file, vectors)
        if in_header:
            return [in_header]
        like, rank, seed = _like(settings), settings["r"], settings.get("projection_prng_key", 0)
        columns = max(kinds[path].in_features for path in vectors)
        rows = max(kinds[path].out_features for path in vectors)
        theirs = VeRAConfig(r=rank, seed=seed, largest_in=columns, largest_out=rows, **like)
        sizes = {(kinds[path].in_features, kinds[path].out_features) for path in vectors}
        ours = [] if rank % len(sizes) else [VeRAConfig(r=rank // len(sizes), seed=seed, **like)]
        return [dict.fromkeys(vectors, config) for config in (theirs, *ours)]


@contextmanager
def _said_what() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"it does not say what its VeRAs are ({error!s:.300})") from None


def _like(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"dropout": settings.get("vera_dropout") or 0.0, "d_initial": settings.get("d_initial", 0.1)}


def _configs_in_header(file: AdapterFile, layers: Iterable[str]) -> dict[str, VeRAConfig]:
    if file.metadata is None:
        return {}
    return {path: VeRAConfig(**_like(file.settings), **_in_header(file.metadata, path)) for path in layers}


def _in_header(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    fields = {name: metadata.get(name) for name in VeRAConfig.decisive}
    return {name: value.get(path) if isinstance(value, dict) else value for name, value in fields.items()}


def _fitting(layouts: list[_Layout], rank: int, found: Tensors) -> _Layout:
    """The first layout whose projections are those of the file."""
    if not found:  # save_projection=False: PEFT draws them again when it reads, and so do we
        return layouts[0]
    shapes = {factor: tuple(matrix.shape) for factor, matrix in found.items()}
    expected = {"A": (rank, layouts[0].columns), "B": (layouts[0].rows, rank)}
    if shapes != expected:
        raise AdapterError(
            f"the projections have shapes {shapes}, expected {expected} for r={rank!r:.80} over these layers"
        )
    fitting = [layout for layout in layouts if layout.rank() == rank]
    if any(matrix.is_meta for matrix in found.values()):  # of a file that is not read yet there are only shapes
        return (fitting or layouts)[0]
    for layout in fitting:
        drawn = layout.projections()
        if all(torch.equal(found[factor], drawn[factor]) for factor in found):
            return layout
    raise AdapterError(
        "its projections are not those that its seed draws here: they come from another program or device, were cast, "
        "or were changed, or the layers are of other sizes. Vectors alone cannot be loaded around others; merge the "
        "adapter with the program that wrote it"
    )


def _own_part(path: str, vectors: Tensors, layout: _Layout) -> dict[str, Tensor]:
    d, block = vectors[_D], layout.block(path)
    if not d.is_meta and (d[: block.start].count_nonzero() or d[block.stop :].count_nonzero()):
        raise AdapterError(f"{path}.{_D} uses projections of layers of other sizes, which cannot be said here")
    return {**vectors, _D: d[block]}
