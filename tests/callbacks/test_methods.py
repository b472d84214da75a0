"""Every method through the callback: trained, saved, resumed, loaded and merged."""

import copy

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_lora import AdapterError, CheckpointError, LoRACallback, disabled, load_from_checkpoint, merge
from lightning_lora.callbacks.settings import METHODS
from lightning_lora.model.layers import adapted_layers
from tests.conftest import relative_difference
from tests.runs import Module, fresh, loader

TOKENS = torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_training_changes_the_function_and_the_merge_keeps_it(method, quantization, trainer):
    module = fresh()
    keys = list(module.state_dict())
    lora = LoRACallback(r=8, method=method, quantization=quantization, merge=False)
    trainer(lora).fit(module, loader())
    assert {layer.adapter("default").config.method for layer in adapted_layers(module).values()} == {method}
    trained = module.eval()(TOKENS)
    with disabled(module):
        assert relative_difference(module(TOKENS), trained) > 1e-3
    merge(module)
    assert list(module.state_dict()) == keys
    assert relative_difference(module(TOKENS), trained) <= 1e-5  # float32: another order of summation


def test_a_run_resumes_bit_for_bit_and_a_checkpoint_is_of_one_method(method, trainer, tmp_path):
    whole = fresh()
    trainer(LoRACallback(r=8, method=method, merge=False)).fit(whole, loader(shuffle=True))
    half, first = fresh(), trainer(LoRACallback(r=8, method=method, merge=False), max_epochs=1)
    first.fit(half, loader(shuffle=True))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    trainer(LoRACallback(r=8, method=method, merge=False)).fit(
        resumed, loader(shuffle=True), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for (name, ours), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, expected), name
    other = "dora" if method != "dora" else "lora"
    with pytest.raises(CheckpointError, match="method is"):
        trainer(LoRACallback(r=8, method=other, merge=False)).fit(
            fresh(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )


def test_a_checkpoint_loads_without_a_trainer(method, trainer, tmp_path):
    module = fresh()
    run = trainer(LoRACallback(r=8, method=method, merge=False))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    seed_everything(0, verbose=False)
    loaded = load_from_checkpoint(Module, tmp_path / "run.ckpt")
    assert torch.equal(loaded(TOKENS), module.eval()(TOKENS))


def test_a_second_run_with_another_method_is_refused(trainer):
    module = fresh()
    trainer(LoRACallback(r=8, method="dora", merge=False), max_epochs=1).fit(module, loader())
    with pytest.raises(AdapterError, match="method is 'lora' there and 'dora' here"):
        trainer(LoRACallback(r=8, merge=False), max_epochs=1).fit(module, loader())


def test_dora_is_evaluated_with_averages_as_they_are(trainer):
    """Averages are swapped in through ``parameter.data``, which no version counter shows."""

    class Watching(Module):
        agree = True

        def validation_step(self, batch, index):
            self.agree = self.agree and torch.equal(self(TOKENS), copy.deepcopy(self.net)(TOKENS))
            super().validation_step(batch, index)

        def training_step(self, batch, index):
            self.agree = self.agree and torch.equal(self(TOKENS), copy.deepcopy(self.net)(TOKENS))
            return super().training_step(batch, index)

    seed_everything(0, verbose=False)
    module = Watching()
    averaging = WeightAveraging(use_buffers=False, avg_fn=get_ema_avg_fn(0.5))
    trainer(LoRACallback(r=8, method="dora", merge=False), averaging).fit(module, loader(), loader())
    assert module.agree


def test_lora_plus_speeds_up_b_and_nothing_else(trainer, tmp_path):
    """Also where the schedule and the monitor go by groups."""
    module = fresh()
    run = trainer(
        LoRACallback(r=8, lr_ratio=16, merge=False), LearningRateMonitor(), max_epochs=3, logger=CSVLogger(tmp_path)
    )
    run.fit(module, loader())
    slow, fast = run.optimizers[0].param_groups
    names = {id(p): name.rpartition(".")[2] for name, p in module.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {"lora_A"}
    assert {names[id(p)] for p in fast["params"]} == {"lora_B"}
    assert (slow["lr"], fast["lr"]) == (pytest.approx(1e-2 * 0.7**3), pytest.approx(16e-2 * 0.7**3))
