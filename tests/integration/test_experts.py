"""A LightningModule around a mixture of experts whose stacked weights are adapted."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, load_adapter, load_from_checkpoint, summary
from lightning_lora.model.layers import adapted_layers
from tests.callbacks.conftest import Module, loader
from tests.conftest import relative_difference

transformers = pytest.importorskip("transformers")
TARGETS = ["all-linear", "experts.*"]
TOKENS = next(iter(loader()))[0]


class Mixture(nn.Module):
    """A tiny Mixtral and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            num_local_experts=4,
        )
        self.body = transformers.MixtralModel(config)
        self.head = nn.Linear(32, 8)

    def forward(self, tokens):
        return self.head(self.body(tokens).last_hidden_state.mean(1, keepdim=True))


class Routed(Module):
    """The same base every time."""

    def __init__(self) -> None:
        seed_everything(0, verbose=False)
        super().__init__(Mixture())


class Watch(Callback):
    """Notes what a run ends with, before it is merged; to be put before ``LoRACallback``."""

    def on_train_end(self, trainer, pl_module):
        self.state = {key: t.clone() for key, t in pl_module.state_dict().items() if ".adapters." in key}
        self.output = output(pl_module)
        self.account = summary(pl_module)


@torch.no_grad()
def output(module):
    was = module.training
    found = module.eval()(TOKENS)
    module.train(was)
    return found


def trainer(folder, *callbacks, **settings) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_module_ends_with_its_own_keys_and_the_trained_function(quantization, tmp_path):
    module, watch = Routed(), Watch()
    keys, base = list(module.state_dict()), output(module)
    callback = LoRACallback(TARGETS, r=4, quantization=quantization, output_dir=tmp_path / "out")
    trainer(tmp_path, watch, callback).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert relative_difference(output(module), watch.output) <= 1e-5  # fp32, another order of summation
    assert relative_difference(output(module), base) > 1e-3
    stored = {row.name: row.storage for row in watch.account.layers if "experts" in row.name}
    assert set(stored.values()) == {"nf4/64 double-quantized" if quantization else "float32"}
    fresh = load_adapter(Routed().net, tmp_path / "out")
    loaded = {f"net.{key}": t for key, t in fresh.state_dict().items() if ".adapters." in key}
    assert all(torch.equal(loaded[key], tensor) for key, tensor in watch.state.items())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    def run(epochs, path=None):
        module, watch = Routed(), Watch()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = (watch, LoRACallback(TARGETS, r=4), keep)
        trainer(tmp_path, *callbacks, max_epochs=epochs).fit(module, loader(shuffle=True), ckpt_path=path)
        return watch.state

    straight = run(2)
    resumed = run(2, tmp_path / "epoch=0.ckpt")
    assert any("experts.down_proj.adapters" in key for key in straight)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def test_a_second_fit_and_a_load_without_a_trainer_take_the_adapters_up(tmp_path):
    module, first, second = Routed(), Watch(), Watch()
    run = trainer(tmp_path, first, LoRACallback(TARGETS, r=4), max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(output(load_from_checkpoint(Routed, tmp_path / "a.ckpt")), first.output)
    trainer(tmp_path, second, LoRACallback(TARGETS, r=4), max_epochs=1).fit(module, loader())
    assert second.state.keys() == first.state.keys()
    assert not adapted_layers(module)
    assert relative_difference(output(module), second.output) <= 1e-5
