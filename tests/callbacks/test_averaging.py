"""Weight averaging beside LoRA: the average of the adapters is what ends up merged."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_lora import LoRACallback, TargetError, UnsupportedError
from lightning_lora.model.layers import adapted_layers
from tests.conftest import Net
from tests.runs import Module, loader


def ema() -> WeightAveraging:
    return EMAWeightAveraging(decay=0.9, use_buffers=False)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-2, swa_epoch_start=1)


class Adapters(Callback):
    """Keeps the adapters of every step, and what they are after the average has been copied back."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_exponential_average_of_the_adapters_is_merged(module, trainer, quantization):
    kept = Adapters()
    run = trainer(LoRACallback(r=4, quantization=quantization), ema(), kept, max_epochs=2)
    run.fit(module, loader(), loader())
    expected = kept.steps[0]
    for step in kept.steps[1:]:  # the closed form: a_t = 0.9 a_(t-1) + 0.1 w_t
        expected = {name: 0.9 * average + 0.1 * step[name] for name, average in expected.items()}
    run.strategy.connect(module)
    run.save_checkpoint(run.default_root_dir + "/after.ckpt", weights_only=True)
    saved = torch.load(run.default_root_dir + "/after.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], tensor, atol=1e-6) for name, tensor in expected.items())
    assert not adapted_layers(module)


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("averager", [ema, swa])
def test_checkpoints_hold_adapters_alone_and_resume_bit_for_bit(trainer, tmp_path, quantization, averager):
    def run(epochs: int, ckpt_path=None) -> Module:
        torch.manual_seed(0)
        module = Module()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}", save_top_k=-1)
        lora = LoRACallback(r=4, quantization=quantization, dropout=0.1)
        trainer(lora, averager(), saver, max_epochs=epochs).fit(module, loader(True), loader(), ckpt_path=ckpt_path)
        return module

    straight = run(4)
    run(2)
    checkpoint = torch.load(tmp_path / "2.ckpt", weights_only=True)
    states = [checkpoint["state_dict"], checkpoint.get("current_model_state")]
    states += [state.get("average_model_state") for state in checkpoint["callbacks"].values()]
    assert all(len(state) == 12 and all("lora_" in key for key in state) for state in states if state is not None)
    assert sum(state is not None for state in states) == 2
    resumed = run(4, tmp_path / "2.ckpt")
    assert resumed.losses == straight.losses[8:]
    assert all(map(torch.equal, resumed.state_dict().values(), straight.state_dict().values()))


@pytest.mark.parametrize("averager", [ema, swa])
def test_the_best_checkpoint_is_tested_after_the_average_was_merged(module, trainer, averager):
    run = trainer(LoRACallback(r=4), averager())
    run.fit(module, loader(), loader())
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert not adapted_layers(module)


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (lambda: [ema(), LoRACallback(r=4)], "EMAWeightAveraging copies the module before.*Put LoRACallback first"),
        (lambda: [swa(), LoRACallback(r=4)], "StochasticWeightAveraging copies the module before.*LoRACallback first"),
        (lambda: [LoRACallback(r=4), EMAWeightAveraging()], r"packed codes.*EMAWeightAveraging\(use_buffers=False\)"),
    ],
)
def test_orders_that_would_average_something_else_are_refused(module, trainer, callbacks, said):
    with pytest.raises(UnsupportedError, match=said):
        trainer(*callbacks()).fit(module, loader())
    assert not adapted_layers(module)


def test_averaging_that_resets_frozen_statistics_is_refused(trainer):
    class Normed(Module):
        def __init__(self):
            super().__init__()
            self.net.norm = nn.BatchNorm1d(6)

    with pytest.raises(UnsupportedError, match=r"resets the running statistics of net\.norm.*train="):
        trainer(LoRACallback(r=4), swa()).fit(Normed(), loader())
    trainer(LoRACallback(r=4, train="norm"), swa(), max_epochs=1).fit(Normed(), loader())


def test_a_model_built_too_late_to_be_averaged_is_refused_with_where_to_build_it(trainer):
    class InSetup(Module):
        def __init__(self):
            super().__init__(nn.Identity())

        def setup(self, stage):
            self.net = Net()

    with pytest.raises(TargetError, match=r"no linear layer.*build the layers in __init__ or configure_model"):
        trainer(LoRACallback(r=4), ema()).fit(InSetup(), loader())
