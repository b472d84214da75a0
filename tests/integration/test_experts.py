"""A LightningModule around a mixture of experts whose stacked weights are adapted."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    TargetError,
    inject,
    load_adapter,
    load_from_checkpoint,
    quantize,
    summary,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.quantization.stacks import NF4Stack
from tests.conftest import relative_difference
from tests.nn.test_experts import mixtral, qwen2, qwen3
from tests.runs import TOKENS, MakeTrainer, Module, loader, output, trainers_in

transformers = pytest.importorskip("transformers")
TARGETS = ["all-linear", "experts.*"]
STACKS = ("gate_up_proj", "down_proj")
EXCLUDE = {mixtral: (), qwen3: (), qwen2: ("shared_expert_gate",)}


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
        layers = adapted_layers(pl_module).items()
        self.bases = {path: type(layer.base_layer) for path, layer in layers if "experts" in path}


@pytest.fixture
def trainer(tmp_path) -> MakeTrainer:
    return trainers_in(tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_module_ends_with_its_own_keys_and_the_trained_function(quantization, trainer, tmp_path):
    module, watch = Routed(), Watch()
    keys, base = list(module.state_dict()), output(module)
    callback = LoRACallback(TARGETS, r=4, quantization=quantization, output_dir=tmp_path / "out")
    trainer(watch, callback).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert relative_difference(output(module), watch.output) <= 1e-5  # fp32, another order of summation
    assert relative_difference(output(module), base) > 1e-3
    stored = {row.name: row.storage for row in watch.account.layers if "experts" in row.name}
    assert set(stored.values()) == {"nf4/64 double-quantized" if quantization else "float32"}
    fresh = load_adapter(Routed().net, tmp_path / "out")
    loaded = {f"net.{key}": t for key, t in fresh.state_dict().items() if ".adapters." in key}
    assert all(torch.equal(loaded[key], tensor) for key, tensor in watch.state.items())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer, tmp_path):
    def run(epochs, path=None):
        module, watch = Routed(), Watch()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = (watch, LoRACallback(TARGETS, r=4), keep)
        trainer(*callbacks, max_epochs=epochs).fit(module, loader(shuffle=True), ckpt_path=path)
        return watch.state

    straight = run(2)
    resumed = run(2, tmp_path / "epoch=0.ckpt")
    assert any("experts.down_proj.adapters" in key for key in straight)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def test_a_second_fit_and_a_load_without_a_trainer_take_the_adapters_up(trainer, tmp_path):
    module, first, second = Routed(), Watch(), Watch()
    run = trainer(first, LoRACallback(TARGETS, r=4), max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(output(load_from_checkpoint(Routed, tmp_path / "a.ckpt")), first.output)
    trainer(second, LoRACallback(TARGETS, r=4), max_epochs=1).fit(module, loader())
    assert second.state.keys() == first.state.keys()
    assert not adapted_layers(module)
    assert relative_difference(output(module), second.output) <= 1e-5


class LanguageModel(LightningModule):
    """A causal language model of transformers as people wrap it."""

    def __init__(self, build) -> None:
        seed_everything(0, verbose=False)
        super().__init__()
        self.model = build()

    def forward(self, tokens):
        return self.model(tokens).logits

    def training_step(self, batch, _):
        return self.model(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("build", [mixtral, qwen2, qwen3])
def test_a_mixture_of_transformers_trains_in_nf4_merges_and_loads(build, trainer, tmp_path):
    module, watch = LanguageModel(build), Watch()
    keys, base = list(module.state_dict()), output(module)
    callback = LoRACallback(TARGETS, r=2, exclude=EXCLUDE[build], output_dir=tmp_path)
    trainer(watch, callback, max_steps=2, max_epochs=1).fit(module, loader())
    assert watch.bases == {f"model.model.layers.{i}.mlp.experts.{name}": NF4Stack for i in (0, 1) for name in STACKS}
    moved = [tensor for key, tensor in watch.state.items() if "experts" in key and key.endswith("lora_B")]
    assert all(tensor.any() for tensor in moved)
    assert list(module.state_dict()) == keys
    assert relative_difference(output(module), watch.output) <= 1e-5  # fp32, another order of summation
    assert relative_difference(output(module), base) > 1e-3
    loaded = quantize(load_adapter(LanguageModel(build).model, tmp_path))
    assert torch.equal(loaded.eval()(TOKENS).logits, watch.output)


def test_a_gate_of_one_output_is_named_with_the_pattern_that_leaves_all_of_them_out():
    with pytest.raises(TargetError, match=r"0\.mlp\.shared_expert_gate: r=2 is more than the full rank 1") as caught:
        inject(qwen2(), config=LoRAConfig(r=2))
    assert str(caught.value).endswith("exclude='shared_expert_gate' (2 layers in all)")
