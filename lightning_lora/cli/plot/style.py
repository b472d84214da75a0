"""How pictures look and how they are written: readable on paper, in black and white, and the same bytes each time.

Series differ in line style and marker, bars in hatching, and colour maps run from dark to light, so that colour carries
nothing alone. Figures are as wide as a page of text, and no letter is smaller than 8 points.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.5
"""Inches; with fonts in points this is the printed size."""
FONT = 8.5
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    {"color": "#d55e00", "linestyle": "-.", "marker": "^"},
    {"color": "#009e73", "linestyle": ":", "marker": "D"},
    {"color": "#cc79a7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#7f7f7f", "linestyle": (0, (1, 1)), "marker": "P"},
)
"""How the first series are drawn, the second, and so on; more than these are not told apart."""
PARTS: dict[str, dict[str, Any]] = {
    "base": {"color": "#1f3f66", "hatch": ""},
    "adapters": {"color": "#d69e2e", "hatch": "//"},
    "trained along": {"color": "#8fb3d9", "hatch": "\\\\"},
    "gradients": {"color": "#f2f2f2", "hatch": ".."},
    "optimizer": {"color": "#b5482f", "hatch": "xx"},
    "activations": {"color": "#dde6da", "hatch": ""},
    "logits": {"color": "#8a8f3c", "hatch": "--"},
    "workspace": {"color": "#ffffff", "hatch": "oo"},
}
"""What bars are made of, and how each part is filled."""
COLORMAP = "cividis"
SUFFIXES = (".png", ".svg")
_SETTINGS: Any = {
    "font.size": FONT,
    "axes.titlesize": FONT + 0.5,
    "axes.labelsize": FONT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.color": "#d0d0d0",
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "lightning_lora",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this style within the context, whatever the user's own settings.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UnsupportedError('pictures need matplotlib: pip install "lightning-lora[plot]"') from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def figure(height: float) -> Figure:
    """Make an empty figure as wide as a page of text, without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(made: Figure, out: Path) -> list[Path]:
    """Write a figure and return the files: as PNG or SVG by the suffix of ``out``, as both where it has none."""
    paths = [out] if out.suffix in SUFFIXES else [out.with_name(out.name + suffix) for suffix in SUFFIXES]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        made.savefig(path, dpi=130, metadata=metadata)
    return paths


def row_height(rows: int) -> float:
    """Inches for so many labelled rows: all of them are labelled up to a page, then every few."""
    return min(max(0.17 * rows, 1.2), 8.0)


def label_rows(axes: Any, names: list[str], height: float) -> None:
    """Write names along the vertical axis, first on top; where they do not fit, every second, third, and so on."""
    every = -(-len(names) // max(1, int(height / 0.15)))
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.set_ylim(len(names) - 0.5, -0.5)
