"""Runs over a base that ``configure_model`` loads: the same as over one that the callback quantizes, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora import (
    AdapterError,
    LoRACallback,
    LoRACLI,
    NF4Config,
    load_base,
    load_from_checkpoint,
    load_quantized,
    parameters_on_meta,
    save_quantized,
)
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.quantization.pack import pack
from tests.cli.toy import Scheduled
from tests.conftest import Net
from tests.loading.folders import written
from tests.runs import Module, loader


class Loading(Module):
    """Its network comes from files, in ``configure_model``, which Lightning calls for every run."""

    def __init__(self, path: str, quantization: str = "nf4", seed: int = 3) -> None:
        super().__init__(torch.nn.Identity())
        self.save_hyperparameters()
        self.net = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with parameters_on_meta():
            self.net = Net()
        if self.hparams.quantization == "saved":
            load_quantized(self.net, self.hparams.path)
        else:
            load_base(self.net, self.hparams.path, quantization=self.hparams.quantization)


class LoadingFromYaml(Scheduled):
    """The same for a run from YAML."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.net = path, None

    def configure_model(self) -> None:
        if self.net is None:
            with parameters_on_meta():
                self.net = Net()
            load_base(self.net, self.path)


@pytest.fixture
def folder(module, tmp_path) -> Path:
    """The weights of ``module``'s network."""
    return written(tmp_path / "base", module.net.state_dict())


def run(trainer, module, **settings):
    made = trainer(LoRACallback(r=4, **settings), max_epochs=1)
    torch.manual_seed(1)
    made.fit(module, loader())
    return made


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_run_is_that_over_a_base_quantized_by_the_callback(quantization, module, folder, trainer):
    theirs = run(trainer, module, quantization=quantization)
    found = Loading(str(folder), quantization)
    ours = run(trainer, found, quantization=quantization)
    assert found.losses == module.losses
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in module.state_dict().items())
    one, other = (
        torch.load(made.checkpoint_callback.best_model_path, weights_only=True)["lightning_lora"]
        for made in (ours, theirs)
    )
    assert one["base_fingerprint"] == other["base_fingerprint"]


def test_a_layer_that_was_packed_and_is_not_adapted_is_named(folder, trainer, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run(trainer, Loading(str(folder)), targets="*_proj")
    assert "without an adapter, which no merged export can hold: net.downs.0 (nf4/64 double-quantized)" in caplog.text


def test_nothing_is_quantized_twice(folder, trainer, monkeypatch):
    packed = []
    monkeypatch.setattr("lightning_lora.loading.pieces.pack", lambda *given: packed.append(given) or pack(*given))
    monkeypatch.setattr("lightning_lora.quantization.quantize.pack", lambda *_: pytest.fail("packed again"))
    run(trainer, Loading(str(folder)), merge=False)
    assert len(packed) == 6


def test_a_saved_base_serves_as_the_one_it_was_saved_from(module, folder, trainer, tmp_path):
    with parameters_on_meta():
        net = Net()
    save_quantized(load_base(net, folder), tmp_path / "saved")
    first, second = Loading(str(folder)), Loading(str(tmp_path / "saved"), "saved")
    run(trainer, first)
    run(trainer, second)
    assert first.losses == second.losses


def test_a_checkpoint_resumes_over_either_base(module, folder, trainer):
    path = run(trainer, module, merge=False).checkpoint_callback.best_model_path
    found = Loading(str(folder))
    trainer(LoRACallback(r=4), max_epochs=2).fit(found, loader(), ckpt_path=path)
    assert len(found.losses) == 4


def test_a_module_is_loaded_from_a_checkpoint_over_its_files(folder, trainer):
    module = Loading(str(folder))
    path = run(trainer, module, merge=False).checkpoint_callback.best_model_path
    found = load_from_checkpoint(Loading, path)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(found(tokens), module.eval()(tokens))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("int8", r"quantization=int8/row. Pass the same to both: quantization='nf4'"),
        (None, r"quantization=None. Pass"),
        (NF4Config(block_size=128), r"quantization=nf4/128 double-quantized"),
    ],
    ids=str,
)
def test_another_storage_than_the_base_has_is_refused(asked, said, folder, trainer):
    with pytest.raises(AdapterError, match=r"q_proj, .* is stored as nf4/64 double-quantized already, .*" + said):
        run(trainer, Loading(str(folder)), quantization=asked)


def test_a_run_from_yaml_loads_its_base(module, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    quiet = {
        "default_root_dir": str(tmp_path),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    content = {
        "seed_everything": 7,
        "lora": {"r": 4, "merge": False},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False, **quiet},
        "model": {"class_path": f"{__name__}.LoadingFromYaml", "init_args": {"path": str(folder)}},
        "data": {"class_path": "tests.cli.toy.Data"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    ran = LoRACLI(args=["fit", "--config", str(tmp_path / "run.yaml")])
    assert len(ran.model.losses) == 4
    assert sum(isinstance(layer, QuantizedLinear) for layer in ran.model.modules()) == 6
