"""``lightning-lora plot``: reads runs and adapters, draws one picture and says where it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_lora.cli import console
from lightning_lora.cli.plot import curves, memory, norms, similarity, spectra
from lightning_lora.cli.plot.adapters import read_adapter
from lightning_lora.cli.plot.runs import CSV, Run, labels, read_run
from lightning_lora.cli.plot.style import SUFFIXES, save, styled
from lightning_lora.errors import LoRAError, listing
from lightning_lora.io.adapter_file import CONFIG
from lightning_lora.metrics.spectrum import Factors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = TypeVar("Value")


def plot(options: Namespace) -> int:
    """Draw what the options ask for and return the exit code.

    Raises:
        LoRAError: If a path holds nothing to draw, or not what is asked for.
        ValueError: If an option does not go with the picture.
    """
    what = options.what or _most_likely(options.paths)
    if options.metric and what != "curves":
        raise ValueError(f"--metric chooses among curves, and --what is {what}")
    if options.layers and what not in ("spectra", "similarity", "norms"):
        raise ValueError(f"--layers chooses layers of spectra, similarity and norms, and --what is {what}")
    if options.out is not None and options.out.suffix and options.out.suffix not in SUFFIXES:
        raise ValueError(f"--out {options.out}: write .png or .svg, or no suffix for both")
    with styled():
        files = save(PICTURES[what](options), options.out or Path(what))
    console.line(f"wrote {', '.join(map(str, files))}")
    return 0


def _curves(options: Namespace) -> Figure:
    runs = _runs(options)
    panels = curves.data(runs, options.metric)
    left_out = sorted({name for run in runs.values() for name in run.curves} - panels.keys())
    if left_out and not options.metric:
        console.line(f"also there, with --metric NAME: {listing(left_out, 12)}")
    return curves.draw(panels, list(runs))


def _spectra(options: Namespace) -> Figure:
    return spectra.draw(spectra.data(_adapters(options)))


def _similarity(options: Namespace) -> Figure:
    found = similarity.data(_adapters(options))
    if found.left_out:
        console.line(f"left out, because their ranks are others: {listing(found.left_out)}")
    return similarity.draw(found)


def _memory(options: Namespace) -> Figure:
    return memory.draw(memory.data(_runs(options)))


def _norms(options: Namespace) -> Figure:
    if all(_is_adapter(path) and not _has_logs(path) for path in options.paths):
        return norms.draw(norms.of_adapters(_adapters(options)), norms.OF_ADAPTERS)
    found = norms.of_runs(_runs(options))
    return norms.draw({label: _chosen(layers, options.layers) for label, layers in found.items()}, norms.OF_RUNS)


PICTURES: dict[str, Callable[[Namespace], Figure]] = {
    "curves": _curves,
    "spectra": _spectra,
    "similarity": _similarity,
    "memory": _memory,
    "norms": _norms,
}
"""What can be drawn."""


def _most_likely(paths: list[Path]) -> str:
    if all(_is_adapter(path) for path in paths):
        return "similarity" if len(paths) == 2 else "spectra"
    return "curves"


def _is_adapter(path: Path) -> bool:
    return path.suffix == ".ckpt" or (path / CONFIG).is_file()


def _has_logs(path: Path) -> bool:
    return path.is_dir() and any(path.rglob(CSV))


def _runs(options: Namespace) -> dict[str, Run]:
    return dict(zip(labels(options.paths), map(read_run, options.paths), strict=True))


def _adapters(options: Namespace) -> dict[str, dict[str, Factors]]:
    found = zip(labels(options.paths), map(read_adapter, options.paths), strict=True)
    return {label: _chosen(layers, options.layers) for label, layers in found}


def _chosen(layers: Mapping[str, Value], patterns: list[str]) -> dict[str, Value]:
    kept = {layer: it for layer, it in layers.items() if not patterns or any(fnmatchcase(layer, p) for p in patterns)}
    if not kept:
        raise LoRAError(f"--layers {' '.join(patterns)} matches none of {listing(layers)}")
    return kept
