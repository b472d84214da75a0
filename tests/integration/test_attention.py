"""A LightningModule around torch's own transformer, whose attention is adapted with the rest."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import AdapterError, LoRACallback, load_adapter, load_from_checkpoint, summary
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.attention import SplitAttention
from lightning_lora.quantization.nf4 import NF4Linear
from tests.conftest import relative_difference
from tests.runs import MakeTrainer, Module, loader, output, trainers_in


class Encoder(nn.Module):
    """Embedding, ``nn.TransformerEncoder`` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 8)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


class Attentive(Module):
    """The same base every time."""

    def __init__(self) -> None:
        seed_everything(0, verbose=False)
        super().__init__(Encoder())


class Early(Attentive):
    """Builds its optimizer before there are adapters, as LightningCLI does: attention in a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        packed = [p for name, p in self.named_parameters() if name.endswith("in_proj_weight")]
        held = set(map(id, packed))
        rest = [p for p in self.parameters() if id(p) not in held]
        self.early = [torch.optim.SGD([{"params": rest, "lr": 1e-2}, {"params": packed, "lr": 1e-3}])]

    def configure_optimizers(self):
        return self.early.pop()


@pytest.fixture
def trainer(tmp_path) -> MakeTrainer:
    return trainers_in(tmp_path)


class Watch(Callback):
    """Notes what a run ends with, before it is merged; to be put before ``LoRACallback``."""

    def on_train_end(self, trainer, pl_module):
        self.state = {key: t.clone() for key, t in pl_module.state_dict().items() if ".adapters." in key}
        self.output = output(pl_module)
        self.groups = [list(group["params"]) for group in trainer.optimizers[0].param_groups]
        self.names = {id(p): name for name, p in pl_module.named_parameters()}


def attentions(module) -> set[type]:
    kinds = (nn.MultiheadAttention, SplitAttention)
    return {type(child) for child in module.modules() if isinstance(child, kinds)}


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_module_ends_with_its_own_keys_and_the_trained_function(trainer, quantization, tmp_path):
    module, watch = Attentive(), Watch()
    keys, base = list(module.state_dict()), output(module)
    trainer(watch, LoRACallback(r=4, quantization=quantization, output_dir=tmp_path / "out")).fit(module, loader())
    assert attentions(module) == {nn.MultiheadAttention}
    assert list(module.state_dict()) == keys
    assert relative_difference(output(module), watch.output) <= 2e-6  # fp32, another order of summation
    assert relative_difference(output(module), base) > 1e-3
    fresh = load_adapter(Attentive().net, tmp_path / "out")
    loaded = {f"net.{key}": t for key, t in fresh.state_dict().items() if ".adapters." in key}
    assert loaded.keys() == watch.state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in watch.state.items())


def test_all_projections_are_trained_and_quantized(trainer):
    module = Attentive()
    trainer(LoRACallback(r=4, merge=False)).fit(module, loader())
    bases = {path: layer.base_layer for path, layer in adapted_layers(module).items() if "self_attn" in path}
    assert len(bases) == 8
    assert all(isinstance(base, NF4Linear) for base in bases.values())
    assert all(layer.adapter("default").lora_B.abs().sum() > 0 for layer in adapted_layers(module).values())
    assert {row.storage for row in summary(module).layers} == {"nf4/64 double-quantized"}


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer, tmp_path, quantization):
    def run(epochs, path=None):
        module, watch = Attentive(), Watch()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(watch, LoRACallback(r=4, quantization=quantization), keep, max_epochs=epochs).fit(
            module, loader(shuffle=True), ckpt_path=path
        )
        return watch.state

    straight = run(3)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == straight.keys()
    resumed = run(3, tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def test_a_second_fit_goes_on_and_a_test_of_a_checkpoint_merges_again(trainer, tmp_path):
    module, keep, first = Attentive(), ModelCheckpoint(tmp_path, monitor="val", filename="best"), Watch()
    run = trainer(first, LoRACallback(r=4), keep)
    run.fit(module, loader(), loader())
    run.test(module, loader(), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert attentions(module) == {nn.MultiheadAttention}
    second = Watch()
    trainer(second, LoRACallback(r=4), max_epochs=1).fit(module, loader())
    assert second.state.keys() == first.state.keys()
    assert attentions(module) == {nn.MultiheadAttention}
    assert relative_difference(output(module), second.output) <= 2e-6


def test_merged_attention_that_was_changed_is_another_base(trainer):
    module = Attentive()
    trainer(LoRACallback(r=4), max_epochs=1).fit(module, loader())
    with torch.no_grad():
        module.net.encoder.layers[0].self_attn.in_proj_weight.mul_(1.5)
    changed = output(module)
    callback = LoRACallback(r=4, quantization=None)
    trainer(callback, limit_test_batches=1).test(module, loader(), verbose=False)
    assert torch.allclose(output(module), changed, atol=1e-5)  # a fresh adapter, on the changed weights


def test_a_checkpoint_is_loaded_without_a_trainer(trainer, tmp_path):
    module, watch = Attentive(), Watch()
    run = trainer(watch, LoRACallback(r=4))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Attentive, tmp_path / "a.ckpt")
    assert attentions(loaded) == {SplitAttention}
    assert torch.equal(output(loaded), watch.output)


def test_an_optimizer_from_before_the_adapters_keeps_attention_in_its_group(trainer):
    module, watch = Early(), Watch()
    trainer(watch, LoRACallback(r=4, optimizer=None), max_epochs=1).fit(module, loader())
    rest, packed = ([watch.names[id(p)] for p in group] for group in watch.groups)
    assert len(packed) == 2 * 3 * 2
    assert all(".self_attn." in name and "out_proj" not in name for name in packed)
    assert len(rest) == 2 * 3 * 2
    assert not any("q_proj" in name for name in rest)


def test_other_targets_than_the_modules_are_refused(trainer):
    module = Attentive()
    trainer(LoRACallback("q_proj", r=4), max_epochs=1).fit(module, loader())
    with pytest.raises(AdapterError, match=r"targets: .*self_attn\.v_proj only there"):
        trainer(LoRACallback("v_proj", r=4), max_epochs=1).fit(module, loader())


def test_a_copy_of_the_adapted_module_is_merged_by_itself(trainer):
    module = Attentive()
    trainer(LoRACallback(r=4, merge=False), max_epochs=1).fit(module, loader())
    twin = copy.deepcopy(module)
    trainer(LoRACallback(r=4), max_epochs=2).fit(twin, loader())
    assert attentions(module) == {SplitAttention}
    assert attentions(twin) == {nn.MultiheadAttention}
