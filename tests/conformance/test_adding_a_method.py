"""The method that the documentation adds works with everything, and nothing in the package knows of it."""

import copy
import re
import sys
import types
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterError,
    LoRACallback,
    LoRAConfig,
    OptimizerError,
    TargetError,
    activate,
    inject,
    load_from_checkpoint,
    merge,
    param_groups,
    quantize,
    summary,
)
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.io.conversion import checkpoint_to_folder
from lightning_lora.io.inspection import inspect
from tests.conformance.combinations import KINDS
from tests.conftest import randomize, relative_difference
from tests.runs import trainers_in

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def scale() -> types.ModuleType:
    """The page's code as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = types.ModuleType("documented_scale")
    sys.modules[module.__name__] = module
    exec(compile(code, str(PAGE), "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_it_adapts_every_kind_of_layer_that_is_called_and_merges(scale, kind):
    sample = KINDS[kind]
    model, x = nn.Sequential(sample.build().double()), sample.x
    if "experts" in kind:
        with pytest.raises(TargetError, match=r"0\.up: experts can be adapted with LoRA only, not with scale"):
            inject(model, sample.paths, scale.ScaleConfig())
        return
    before = model(x)
    inject(model, sample.paths, scale.ScaleConfig())
    assert relative_difference(model(x), before) <= 1e-12  # attention computes in another order
    randomize(model, std=0.5)
    adapted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    assert summary(model).layers[0].method == "scale"
    assert relative_difference(merge(model)(x), adapted) <= 1e-12


def test_it_trains_over_a_quantized_base_and_is_refused_beside_another(scale):
    model = quantize(inject(nn.Sequential(nn.Linear(64, 32)), "0", scale.ScaleConfig()))
    model(torch.randn(3, 64)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.adapters.default.gain"}
    inject(model, "0", LoRAConfig(r=2), name="second")
    with pytest.raises(AdapterError, match="'default' is scale"):
        activate(model, "default", "second")


class Module(L.LightningModule):
    """Its base is the same whenever it is built."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))

    def training_step(self, batch, _):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture
def named(scale, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "scale", scale.ScaleConfig)


@pytest.fixture
def fit(tmp_path):
    def run(**arguments) -> tuple[Module, L.Trainer]:
        callback = LoRACallback("*", method="scale", merge=False, **arguments)
        trainer = trainers_in(tmp_path, max_steps=4, max_epochs=-1)(callback)
        module = Module()
        trainer.fit(module, DataLoader(torch.randn(32, 16), batch_size=8))
        return module, trainer

    return run


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_its_name_alone_gives_runs_and_their_checkpoints(named, fit, quantization, tmp_path):
    module, trainer = fit(quantization=quantization)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    loaded, x = load_from_checkpoint(Module, tmp_path / "it.ckpt"), torch.randn(3, 16)
    assert all(p.abs().max() > 0 for name, p in loaded.named_parameters() if name.endswith("gain"))
    assert torch.equal(loaded.net(x), module.eval().net(x))
    assert inspect(tmp_path / "it.ckpt")["method"] == "scale"


def test_what_it_cannot_do_is_refused_before_it_is_trained(named, fit, tmp_path):
    with pytest.raises(ValueError, match="method='scale' does not have r=8; it has start"):
        LoRACallback(method="scale", r=8)
    with pytest.raises(AdapterError, match=r"output_dir='out' could not get .* no method 'scale', which is on 0, 2"):
        fit(output_dir="out")
    with pytest.raises(OptimizerError, match=r"lr_ratio=16 is for factors B .* adapters of scale have none"):
        fit(lr_ratio=16)


def test_it_has_no_place_in_a_folder_and_no_groups_of_lora_plus(named, fit, tmp_path):
    module, trainer = fit(quantization=None)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(AdapterError, match="PEFT's format has no method 'scale'"):
        checkpoint_to_folder(tmp_path / "it.ckpt", tmp_path / "folder")
    assert [group["name"] for group in param_groups(module, lr=1.0)] == ["vectors"]
    with pytest.raises(OptimizerError, match="lr_ratio=4"):
        param_groups(module, lr=1.0, lr_ratio=4)
