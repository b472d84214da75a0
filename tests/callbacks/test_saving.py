"""A checkpoint that cannot be written is one clear error or one warning, and the last good one still loads."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import CheckpointError, LoRACallback
from tests.runs import loader

resource = pytest.importorskip("resource")


@contextmanager
def full_disk(size: int = 4096):
    """No file of this process can grow beyond ``size`` bytes: a full disk, as far as a writer can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class DiskFullInEpochs(Callback):
    """The disk is full while some epochs end."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs
        self.full = None

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            self.full = full_disk()
            self.full.__enter__()

    def on_train_epoch_start(self, trainer, pl_module):
        self.clear()

    def clear(self, *_):
        if self.full is not None:
            self.full.__exit__(None, None, None)
            self.full = None

    on_train_end = on_exception = clear


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def last_only(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=1)


def test_a_full_disk_stops_the_run_with_one_error_and_leaves_the_last_good_checkpoint(module, trainer, tmp_path):
    run = trainer(LoRACallback(r=4), DiskFullInEpochs(1), last_only(tmp_path / "ckpt"), max_epochs=3)
    with pytest.raises(CheckpointError) as error:
        run.fit(module, loader())
    said = str(error.value)
    assert "epoch=1.ckpt was not written: File too large" in said
    assert f"The last good one is {tmp_path / 'ckpt' / 'epoch=0.ckpt'}" in said
    assert "on_save_error='warn'" in said
    assert files(tmp_path / "ckpt") == ["epoch=0.ckpt"]
    torch.load(tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)


def test_with_warn_training_goes_on_and_the_last_good_checkpoint_is_spared(module, trainer, tmp_path):
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(files(tmp_path / "ckpt") if (tmp_path / "ckpt").exists() else [])

    lora, saver = LoRACallback(r=4, on_save_error="warn"), last_only(tmp_path / "ckpt")
    run = trainer(lora, DiskFullInEpochs(1), Look(), saver, max_epochs=4)
    with pytest.warns(UserWarning, match=r"epoch=1\.ckpt was not written.*good one is .*epoch=0.*Training goes on"):
        run.fit(module, loader())
    assert seen == [[], ["epoch=0.ckpt"], ["epoch=0.ckpt"], ["epoch=2.ckpt"]]
    assert files(tmp_path / "ckpt") == ["epoch=3.ckpt"]
    assert len(module.losses) == 16


def test_with_warn_a_folder_that_cannot_be_written_at_the_end_does_not_lose_the_merge(module, trainer, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    run = trainer(LoRACallback(r=4, output_dir=tmp_path / "out", on_save_error="warn"), max_epochs=1)
    with pytest.warns(UserWarning, match="out was not written"):
        run.fit(module, loader())
    assert type(module.net.downs[0]) is torch.nn.Linear


@pytest.mark.parametrize("place", ["a file in the way", "a folder in the way", "a name too long"])
def test_a_path_that_cannot_be_written_is_named_with_the_fix(module, trainer, tmp_path, place):
    run = trainer(LoRACallback(r=4), max_epochs=1, enable_checkpointing=False)
    run.fit(module, loader())
    path = tmp_path / "a" / "x.ckpt"
    if place == "a file in the way":
        path.parent.write_text("mine")
    elif place == "a folder in the way":
        (path / "inside").mkdir(parents=True)
    else:
        path = tmp_path / ("n" * 300)
    before = {p: p.is_dir() for p in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match="was not written"):
        run.save_checkpoint(path)
    assert {p: p.is_dir() for p in tmp_path.rglob("*")} == before


def test_no_temporary_file_is_on_another_filesystem(module, trainer, tmp_path, monkeypatch):
    """Lightning's own writer would copy it over the last good checkpoint from there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    run = trainer(LoRACallback(r=4), max_epochs=1)
    run.fit(module, loader())
    torch.load(run.checkpoint_callback.best_model_path, weights_only=True)


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_checkpoint_gets_the_mode_that_the_umask_gives(module, trainer, tmp_path):
    before = os.umask(0o027)
    try:
        run = trainer(LoRACallback(r=4), max_epochs=1)
        run.fit(module, loader())
    finally:
        os.umask(before)
    assert Path(run.checkpoint_callback.best_model_path).stat().st_mode & 0o777 == 0o640


def test_a_checkpoint_io_of_the_users_is_left_in_place(module, trainer, tmp_path):
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Mine(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *arguments, **options):
            self.saved += 1
            super().save_checkpoint(*arguments, **options)

    mine = Mine()
    trainer(LoRACallback(r=4), max_epochs=1, plugins=[mine]).fit(module, loader())
    assert mine.saved == 1


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="on_save_error must be one of raise, warn"):
        LoRACallback(on_save_error="ignore")


@pytest.fixture(autouse=True)
def _room_again():
    yield
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
