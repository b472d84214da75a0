"""Writing a model as safetensors files, one part in memory at a time, complete or absent.

``safetensors.save_file`` wants all tensors at once. Here the header is written from shapes alone, and each part is
made, written to its place and dropped. On Linux the disk is set to work as data comes, so that little is left for the
``fsync`` at the end.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_lora.errors import MergeError, listing
from lightning_lora.io.atomic import replacing_all
from lightning_lora.io.dtypes import NAMES
from lightning_lora.io.workers import run
from lightning_lora.model.merge import is_finite
from lightning_lora.model.sizes import as_bytes

_NOTHING: Mapping[str, Callable[[Path], object]] = MappingProxyType({})
_VERIFIED = 4
_PIECE = 2**23
_FULL = (errno.ENOSPC, errno.EDQUOT)


Made = Iterable[tuple[str, Tensor]]
"""Tensors by name, each whole, or its rows piece by piece in order."""


@dataclass(frozen=True)
class Naming:
    """How the files of a model are called.

    Attributes:
        stem: What all names begin with.
    """

    stem: str

    @property
    def single(self) -> str:
        """The one file of a model that is not in shards."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """What says which shard holds what."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int, *, second: bool = False) -> str:
        """One of several; the ``second`` names are for those written while the first are in use."""
        return f"{self.stem}-{'b-' * second}{number:05d}-of-{count:05d}.safetensors"

    def is_shard(self, name: str) -> bool:
        """Whether a file is called as a shard."""
        return re.fullmatch(rf"{self.stem}-(b-)?\d{{5}}-of-\d{{5}}\.safetensors", name) is not None

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds a model under these names."""
        return (folder / self.single).is_file() or (folder / self.index).is_file()


MODEL = Naming("model")
"""What every program looks for."""

QUANTIZED = Naming("quantized")
"""What only this one does: another would take packed tensors for missing ones, and draw those."""


@dataclass(frozen=True)
class Part:
    """Some tensors that are made together.

    Attributes:
        outline: Meta tensors of the shapes and dtypes they will have, by name.
        make: Makes them, tensor by tensor in any order, each whole or piece by piece.
        computed: Whether they are results, to be checked, rather than copies of what is there.
    """

    outline: Mapping[str, Tensor]
    make: Callable[[], Made]
    computed: bool = False

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(map(_size, self.outline.values()))


@torch.no_grad()
def write_shards(
    folder: Path,
    parts: Sequence[Part],
    *,
    max_shard_size: int | str,
    metadata: Mapping[str, str],
    beside: Mapping[str, Callable[[Path], object]] = _NOTHING,
    naming: Naming = MODEL,
    at_once: int = 1,
) -> None:
    """Write the parts to ``folder``: to ``model.safetensors``, or to shards and their index where they are larger.

    All files are written beside their places, read again and compared with parts that are made a second time; then they
    take their places. What a reader looks at first comes last: shards never take the names of those in use, and become
    the model in the one step in which the index is replaced. A reader finds the old model or the new one, always.

    Args:
        folder: Where to; made if it is not there.
        parts: What to write, in the order of the model.
        max_shard_size: Bytes of a file at most, unless a single tensor is larger.
        metadata: For the header of each file, beside ``format``.
        beside: Other files of the model by name, such as its config: each writes itself to a path.
        naming: What the files are called.
        at_once: How many parts are made and written at a time, each in a thread of its own where it is more than one.

    Raises:
        MergeError: If a computed tensor is not finite, or what was read again is not what was written.
        OSError: If there is no room; what was there before is untouched.
    """
    shards = _split(parts, as_bytes("max_shard_size", max_shard_size))
    names = [naming.single] if len(shards) == 1 else _free_names(folder, naming, len(shards))
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(folder, sum(part.size for part in parts))
    index = [naming.index] * (len(shards) > 1)
    with replacing_all([folder / name for name in (*beside, *names, *index)]) as temporaries:
        for write, file in zip(beside.values(), temporaries, strict=False):
            write(file)
        files = temporaries[len(beside) :][: len(names)]
        with _naming(folder):
            places = [_write(file, shard, metadata, at_once) for file, shard in zip(files, shards, strict=True)]
        _verify(files, shards, places, at_once)
        if index:
            _write_index(temporaries[-1], names, shards)
    _drop_older(folder, naming, names)


def _split(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.size
    return shards


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Let an error of the disk, which knows a number alone, name the folder and say what to do."""
    try:
        yield
    except OSError as error:
        remedy = "Free some, or choose another folder" if error.errno in _FULL else "Check the disk, or choose another"
        said = f"{error.strerror}; the model was not written, and what was there before still is. {remedy}"
        raise OSError(error.errno, said, str(folder)) from error


def _write(file: Path, parts: Iterable[Part], metadata: Mapping[str, str], at_once: int) -> dict[str, int]:
    """Write one file; returns where in it each tensor begins."""
    outline = {name: tensor for part in parts for name, tensor in part.outline.items()}
    # Large elements first: each tensor then starts at a multiple of its element's size, as readers of the map need.
    order = sorted(outline, key=lambda name: -outline[name].element_size())
    ends = list(accumulate(_size(outline[name]) for name in order))
    begins = dict(zip(order, [0, *ends[:-1]], strict=True))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, end in zip(order, ends, strict=True):
        tensor = outline[name]
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    data = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    data += b" " * (-len(data) % 8)
    places = {name: 8 + len(data) + begin for name, begin in begins.items()}
    file.write_bytes(len(data).to_bytes(8, "little") + data)
    run((partial(_write_part, file, part, places) for part in parts), at_once=at_once)
    return places


@torch.no_grad()
def _write_part(path: Path, part: Part, places: Mapping[str, int]) -> None:
    with path.open("r+b", buffering=0) as file:
        for place, data in _placed(part, places):
            _write_at(file, place, data)


def _write_at(file: FileIO, offset: int, data: memoryview) -> None:
    size = len(data)
    file.seek(offset)
    while data:  # one call writes 2 GiB at most
        data = data[file.write(data) :]
    if sys.platform == "linux":
        # Starts to write this to disk without waiting, as fsync would, and drops from memory only what is there.
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def _placed(part: Part, places: Mapping[str, int]) -> Iterator[tuple[int, memoryview]]:
    """Make a part; yield what goes where in the file."""
    at = {name: places[name] for name in part.outline}
    for name, tensor in part.make():
        if part.computed and not is_finite(tensor):
            raise MergeError(
                f"NaN or infinity in {name}; nothing was written. A NaN comes from a diverged training or a broken "
                "base: go back to an earlier checkpoint. An infinity comes from a dtype too narrow: dtype=torch.float32"
            )
        assert tensor.dtype == part.outline[name].dtype, name
        yield at[name], _memory(tensor)
        at[name] += _size(tensor)
    assert all(at[name] == places[name] + _size(tensor) for name, tensor in part.outline.items()), at


def _memory(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(b"") if not len(flat) else flat.view(torch.uint8).numpy().data


def _verify(
    files: Sequence[Path], shards: Sequence[Sequence[Part]], places: Sequence[Mapping[str, int]], at_once: int
) -> None:
    """Read the files again: all headers, and a sample of the computed tensors, made once more."""
    computed = []
    for file, shard, begins in zip(files, shards, places, strict=True):
        with safe_open(file, "pt") as opened:
            if set(opened.keys()) != begins.keys():
                raise MergeError(f"{file.parent}: the tensors read again are not those written; is the disk sound?")
        computed += [(file, part, begins) for part in shard if part.computed]
    sample = computed[:: max(1, len(computed) // _VERIFIED)][:_VERIFIED]
    run((partial(_verify_part, *each) for each in sample), at_once=at_once)


@torch.no_grad()
def _verify_part(file: Path, part: Part, places: Mapping[str, int]) -> None:
    if not all(_is_at(file, place, data) for place, data in _placed(part, places)):
        raise MergeError(
            f"{file.parent}: {listing(list(part.outline))} read again is not what was computed. Either the disk is "
            "not sound, or the model was changed while it was being written"
        )


def _is_at(path: Path, offset: int, data: memoryview) -> bool:
    """Whether a file holds these bytes there, read in pieces: a map of it would stay in memory."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return all(_read(file, data[i : i + _PIECE]) for i in range(0, len(data), _PIECE))


def _read(file: Any, expected: memoryview) -> bool:
    return bool(file.read(len(expected)) == bytes(expected))  # as bytes: views are compared element by element


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        needed = f"{os.strerror(errno.ENOSPC)}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, needed, str(folder))


def _write_index(file: Path, names: Sequence[str], shards: Sequence[Sequence[Part]]) -> None:
    weights = {key: name for name, shard in zip(names, shards, strict=True) for part in shard for key in part.outline}
    total = sum(part.size for shard in shards for part in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n")


def _drop_older(folder: Path, naming: Naming, names: Sequence[str]) -> None:
    """Delete the files of an earlier export, which a reader might prefer to these."""
    kept = {*names, naming.index} if len(names) > 1 else set(names)
    shards = sorted(path for path in folder.iterdir() if naming.is_shard(path.name))
    for path in (folder / naming.single, folder / naming.index, *shards):  # an index goes before its shards
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _free_names(folder: Path, naming: Naming, count: int) -> list[str]:
    """Names for shards, other than those of the model that is in the folder."""
    in_use = _shards_in(folder / naming.index)
    names, others = ([naming.shard(n, count, second=s) for n in range(1, count + 1)] for s in (False, True))
    return names if in_use.isdisjoint(names) else others


def _shards_in(index: Path) -> set[str]:
    """Names of the shards in an index; nothing if it is not there or cannot be read."""
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return set()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
