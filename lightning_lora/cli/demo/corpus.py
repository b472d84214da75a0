"""Real text that every Python carries: the standard library's sources (code) and ``pydoc_data.topics`` (English).

Both are split so that held-out text is never trained on: code by file, English by topic, with every paragraph that also
stands in a held-out topic taken out of the training text (the language reference repeats sections).
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

_NO_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text, each a one-dimensional ``uint8`` tensor of bytes."""

    train: Tensor
    held_out: Tensor


def english() -> Corpus:
    """The help topics of ``pydoc``: about 400 kB to train on, 60 kB held out."""
    texts = {name: text.strip() for name, text in sorted(topics.topics.items())}
    held_names = [name for name in texts if _bucket(name) == 0]
    held = "\n\n".join(texts[name] for name in held_names)
    seen = {paragraph.strip() for paragraph in held.split("\n\n")}
    kept = (
        p for name, text in texts.items() if name not in held_names for p in text.split("\n\n") if p.strip() not in seen
    )
    return Corpus(_as_bytes("\n\n".join(kept)), _as_bytes(held))


def code() -> Corpus:
    """The standard library's ``.py`` files without its tests: about 10 MB to train on, one file in eight held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not _NO_CODE.intersection(p.relative_to(root).parts)]
    train: list[str] = []
    held: list[str] = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        (held if _bucket(path.relative_to(root).as_posix()) == 0 else train).append(text)
    return Corpus(_as_bytes("\n".join(train)), _as_bytes("\n".join(held)))


def from_file(path: Path) -> Corpus:
    """A text file of the user's: its last tenth is held out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text:
        raise ValueError(f"--data {path}: the file is empty")
    data = _as_bytes(text)
    cut = len(data) - len(data) // 10
    return Corpus(data[:cut], data[cut:])


def windows(text: Tensor, length: int, *, limit: int | None = None) -> Tensor:
    """Cut text into ``(count, length + 1)`` windows, at most ``limit`` of them, evenly spread."""
    count = (len(text) - 1) // length
    if count < 1:
        raise ValueError(
            f"the text, or its held-out tenth, has {len(text)} bytes; one window takes {length + 1}. Pass a longer "
            "--data"
        )
    starts = torch.arange(count) * length
    if limit is not None and count > limit:
        starts = starts[torch.linspace(0, count - 1, limit).long()]
    return text[starts[:, None] + torch.arange(length + 1)].long()


def _bucket(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % 8


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
