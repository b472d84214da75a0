"""Printing for people: tables and progress with rich where it is installed (extra ``cli``), plain text otherwise."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_lora import dependencies
from lightning_lora.errors import UnsupportedError

try:
    from rich.console import Console
    from rich.table import Table

    HAS_RICH = True
except ImportError:
    HAS_RICH = False


def line(text: str) -> None:
    """Print a line."""
    print(text, flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    if HAS_RICH:
        made = Table(*head, title=title, title_justify="left")
        for row in rows:
            made.add_row(*row)
        Console(soft_wrap=False).print(made)
        return
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}")
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def progress_bar() -> ProgressBar:
    """Lightning's progress bar in the nicest form that is installed."""
    return RichProgressBar(refresh_rate=5) if HAS_RICH else TQDMProgressBar(refresh_rate=5)


def environment() -> str:
    """One line on the machine and the versions that matter."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    versions = f"Python {platform.python_version()} | torch {torch.__version__} | bitsandbytes {bitsandbytes_version()}"
    return f"{device} | {versions}"


def bitsandbytes_version() -> str:
    """The installed version, or ``not installed``."""
    try:
        return str(dependencies.bitsandbytes("the demo").__version__)
    except UnsupportedError:
        return "not installed"
