"""``load_base``: a base model from safetensors files to its packed form, without ever being whole in 16 bit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError, TargetError, listing
from lightning_lora.io.notes import tell
from lightning_lora.loading.buffers import recomputed_buffers, refuse_lost_attributes
from lightning_lora.loading.names import Place, Rename, match, places
from lightning_lora.loading.pieces import DensePiece, PackedPiece, Piece, Target
from lightning_lora.loading.reader import Reader, opened
from lightning_lora.loading.stream import device_for, require_plain, stream
from lightning_lora.model.split import layer_at, place_of
from lightning_lora.model.targets import ALL_LINEAR, refuse_tied, resolve
from lightning_lora.nn.base import stored_weight
from lightning_lora.nn.fingerprint import WHOLE_UP_TO
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.expected_error import lossy
from lightning_lora.quantization.formats import config_of
from lightning_lora.quantization.quantize import check_quantizable


@torch.no_grad()
def load_base(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: str | Iterable[str] = (),
    quantization: str | QuantizationConfig | None = "nf4",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rename: Rename | None = None,
) -> nn.Module:
    """Load safetensors files into a model built on the meta device, in place, and return it.

    Tensor by tensor from the files to ``device``; weights of target layers are quantized there as they arrive, so the
    memory is that of the packed model and at most 128 MiB of files, or the largest layer. A thread reads ahead
    meanwhile. The model is the one that loading, :func:`inject` and :func:`quantize` would have made, bit for bit, with
    the fingerprints of the dense weights: adapters and checkpoints fit both.

    All or nothing: names, shapes and targets are checked before the first byte is read, and the model changes when all
    have been read. What the model ties is tied afterwards, and one of the names in the files is enough.

    Args:
        model: Built under :func:`parameters_on_meta` or ``torch.device("meta")``. A model whose parameters hold values
            gets new ones.
        path: A folder with ``model.safetensors`` or ``model.safetensors.index.json``, or one safetensors file.
        targets: Layers to quantize, as for :func:`inject`: ``"all-linear"`` (every linear layer but the output head),
            or patterns. Pass what is going to be adapted; a layer that is packed without an adapter stays so.
        exclude: Patterns of layers to keep dense.
        quantization: ``"nf4"``, ``"fp4"``, ``"nf3"``, ``"nf2"``, ``"int8"``, or their configs; None keeps all dense.
        device: Where to. None is where tensors are made by default: the CPU, and in ``configure_model`` of a
            LightningModule the device of the run.
        dtype: What floating-point tensors that stay dense are cast to, and merged weights will have; None keeps what
            the files have. Weights are quantized from what is in the files.
        rename: From names in the files to names in the model: a mapping from the beginning of names to what stands in
            its place (the longest one counts), or a function of a name; None leaves the tensor out. Without it, one
            prefix that all names have too much or lack is found, if only one makes everything fit.

    Raises:
        LoadError: If the files are damaged, or names, shapes or kinds of numbers do not fit; if a buffer on the meta
            device is not in the files and cannot be computed again; if the model is adapted or quantized already.
        TargetError: If a pattern does not fit the model.
        QuantizationError: If no target can be quantized, or a weight that is to be quantized is not finite.
        UnsupportedError: If bitsandbytes is not installed.
        ValueError: If a value is none of the choices.
    """
    where = device_for(device)
    config = None if quantization is None else config_of(quantization)
    require_plain(model, "load_base")
    refuse_lost_attributes(model)
    files = opened(Path(path))
    found = places(model)
    sources = match(model, found, files.outline, rename, path)
    layers, left = ([], {}) if config is None else _chosen(model, targets, exclude, config, where)
    absent = [place for place in found if place not in sources]
    computed = recomputed_buffers(model, [place.names[0] for place in absent if place.outline.is_meta])
    rest = {place: computed.get(place.names[0], place.outline) for place in absent}
    pieces = _Pieces(model, files.outline, sources, rest)
    if config is not None:
        pieces.pack(layers, config, left)
    with where:  # small tensors that are made on the way belong there too
        staged = stream(pieces.in_order(), Reader(files, pinned=where.type == "cuda"), Target(where, dtype))
    for place, buffer in rest.items():
        staged.tensor(place.names, buffer.to(where))
    _tell_left(left, layers)
    staged.install(model)
    return model


class _Pieces:
    """The places of a model, put together to what is loaded at once.

    Args:
        model: On the meta device.
        outline: Meta tensors by their names in the files.
        sources: Names in the files for each place.
        rest: Buffers that are not in the files.
    """

    def __init__(
        self,
        model: nn.Module,
        outline: Mapping[str, Tensor],
        sources: Mapping[Place, tuple[str, ...]],
        rest: Mapping[Place, Tensor],
    ) -> None:
        self._model, self._outline, self._sources = model, outline, sources
        self._names = {name: names for place, names in sources.items() for name in place.names}
        self._rest = {name: buffer for place, buffer in rest.items() for name in place.names}
        self._packed: dict[str, PackedPiece] = {}

    def pack(self, layers: Iterable[str], config: QuantizationConfig, left: dict[str, str]) -> None:
        """Let the weights of these layers be packed; ``left`` takes those whose values forbid it."""
        around: dict[str, list[str]] = {}
        for layer in layers:
            path = place_of(self._model, layer)
            around.setdefault(path, []).append(layer.removeprefix(path).removeprefix("."))
        size = sum(stored_weight(layer_at(self._model, layer)).numel() * self._width(layer) for layer in layers)
        for path, parts in around.items():
            module = self._model.get_submodule(path)
            inside = {name: f"{path}.{name}" for name in _tensors(module)}
            sources = {name: self._names[full] for name, full in inside.items() if full in self._names}
            piece = PackedPiece(
                size=self._size(sources.values()),
                path=path,
                module=module,
                sources=sources,
                known={name: self._rest[full] for name, full in inside.items() if full in self._rest},
                parts=tuple(parts),
                config=config,
                whole=size <= WHOLE_UP_TO,
                left=left,
            )
            self._packed |= dict.fromkeys(inside.values(), piece)

    def in_order(self) -> list[Piece]:
        """All pieces, in the order of the model."""
        pieces: dict[int, Piece] = {}
        for place, sources in self._sources.items():
            piece: Piece | None = next((self._packed[name] for name in place.names if name in self._packed), None)
            piece = piece or DensePiece(self._size([sources]), place.names, sources)
            pieces[id(piece)] = piece
        return list(pieces.values())

    def _size(self, sources: Iterable[tuple[str, ...]]) -> int:
        tensors = [self._outline[name] for names in sources for name in names]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _width(self, path: str) -> int:
        """Bytes of an element of a layer's weight in the files: those of the widest matrix around it."""
        around = place_of(self._model, path)
        names = [f"{around}.{name}" for name in _tensors(self._model.get_submodule(around))]
        found = [self._outline[self._names[name][0]] for name in names if name in self._names]
        return max(tensor.element_size() for tensor in found if tensor.ndim > 1)


def _tensors(module: nn.Module) -> list[str]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [name for name, _ in named]


def _chosen(
    model: nn.Module,
    targets: str | Iterable[str],
    exclude: str | Iterable[str],
    config: QuantizationConfig,
    device: torch.device,
) -> tuple[list[str], dict[str, str]]:
    """The layers to quantize, and those among the targets that stay dense, with the reason."""
    patterns = tuple(targets) if isinstance(targets, Mapping) else targets
    plan = resolve(model, patterns, LoRAConfig(r=1), exclude=exclude)
    refuse_tied(model, plan.layers)
    if any(place_of(model, path) == "" for path in plan.layers):
        raise TargetError(
            "the model is itself the layer to quantize and cannot replace itself; wrap it, e.g. in nn.Sequential"
        )
    if config.needs_start:
        warnings.warn(
            f"{lossy(config)}, and loaded so, what is lost is gone before adapters could start from it. Load the dense "
            "model and use init='loftq', or quantization='nf4'",
            UserWarning,
            stacklevel=4,
        )
    left = check_quantizable({path: layer_at(model, path) for path in plan.layers}, config, device)
    return [path for path in plan.layers if path not in left], left


def _tell_left(left: Mapping[str, str], layers: Collection[str]) -> None:
    reasons = listing(f"{name} ({reason})" for name, reason in left.items())
    if layers and all(name in left for name in layers):
        raise QuantizationError(f"none of the {len(left)} layers can be quantized: {reasons}. Use quantization=None")
    if left:
        tell(f"load_base: not quantized: {reasons}")
