"""What is saved over and over while processes are killed: adapter folders, checkpoints, exports, each in versions.

A version is a number that every trained tensor is made of, so that a mixture of two saves is none of the versions.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from tqdm import tqdm

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    export_merged,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.io.base_files import BaseFiles
from tests.conftest import Net
from tests.runs import Module, loader

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
WIDTH = 128


class Layout(ABC):
    """Something on disk that is written again and again in the same place."""

    name: str

    @abstractmethod
    def write(self, folder: Path, version: int) -> None:
        """Write a version."""

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read what is there, whole."""

    @cache  # noqa: B019 (a few layouts that live as long as the process)
    def expected(self, version: int) -> dict[str, Tensor]:
        """What a reader finds after a version was written and nothing went wrong."""
        with tempfile.TemporaryDirectory() as place:
            self.write(Path(place), version)
            return self.read(Path(place))

    def is_version(self, found: dict[str, Tensor], version: int) -> bool:
        """Whether what was read is this version, bit for bit."""
        expected = self.expected(version)
        return found.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in found.items())


class AdapterFolder(Layout):
    """An adapter folder; ``changing`` writes versions of two ranks, so that its config changes too."""

    def __init__(self, *, changing: bool) -> None:
        self.name = "adapter folder, config changing" if changing else "adapter folder"
        self.ranks = (4, 8) if changing else (4, 4)

    def write(self, folder: Path, version: int) -> None:
        """Save an adapter."""
        save_adapter(adapted(self.ranks[version % 2], version), folder / "adapter")

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Load it into a model."""
        return load_adapter(plain(), folder / "adapter").state_dict()


class Checkpoint(Layout):
    """``last.ckpt`` of a Trainer with the callback."""

    name = "Lightning checkpoint"

    def __init__(self) -> None:
        class Seeded(Module):
            def __init__(self) -> None:
                super().__init__(plain())

        self.kind, self.module = Seeded, Seeded()
        lora = LoRACallback(r=4, merge=False)
        with tempfile.TemporaryDirectory() as place:
            self.trainer = Trainer(max_steps=1, callbacks=[lora], default_root_dir=place, **QUIET)
            self.trainer.fit(self.module, loader())

    def write(self, folder: Path, version: int) -> None:
        """Save as ``ModelCheckpoint`` does."""
        fill(self.module, version)
        self.trainer.save_checkpoint(folder / "last.ckpt")

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Build the module from it."""
        return load_from_checkpoint(self.kind, folder / "last.ckpt").state_dict()


class Export(Layout):
    """A merged export, in files of at most ``sizes`` in turn."""

    def __init__(self, name: str, *sizes: str) -> None:
        self.name, self.sizes = name, sizes

    def write(self, folder: Path, version: int) -> None:
        """Export."""
        export_merged(adapted(4, version), folder / "merged", max_shard_size=self.sizes[version % len(self.sizes)])

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read it as ``lightning-lora merge`` reads a base."""
        files = BaseFiles(folder / "merged")
        return {name: files.read(name) for name in files.outline}


def layouts() -> list[Layout]:
    """Every layout."""
    warnings.simplefilter("ignore")
    for name in ("lightning_lora", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would be forked away from
    return [
        AdapterFolder(changing=False),
        AdapterFolder(changing=True),
        Checkpoint(),
        Export("merged export, one file", "5GB"),
        Export("merged export, shards", "300KB"),
        Export("merged export, shards and one file in turn", "300KB", "5GB"),
    ]


def plain() -> nn.Module:
    """The base model, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(width=WIDTH)


def adapted(r: int, version: int) -> nn.Module:
    """The base with an adapter and a head of a version."""
    return fill(inject(plain(), config=LoRAConfig(r=r), train="head"), version)


@torch.no_grad()
def fill(model: nn.Module, version: int) -> nn.Module:
    """Make every trained tensor one of a version."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape) * (version + 1) / 64)
    return model
