"""One callback, a whole run: what a user of ``LoRACallback`` relies on."""

import copy
import pickle
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_lora import (
    AdapterError,
    CheckpointError,
    GradientError,
    LoRACallback,
    LoRAConfig,
    MergeError,
    NF4Config,
    OptimizerError,
    QuantizationError,
    TargetError,
    UnsupportedError,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
)
from lightning_lora.callbacks.checkpoints import check_optimizers
from lightning_lora.model.layers import adapted_layers
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.quantization.nf4 import NF4Linear
from tests.callbacks.conftest import Module, loader
from tests.conftest import Net, relative_difference

TOKENS = torch.arange(12).reshape(2, 6)


class Watch(Callback):
    """Looks at the run from outside; put before the LoRA callback it sees the model before it is merged."""

    def on_fit_start(self, trainer, pl_module):
        self.base = {k: v.clone() for k, v in pl_module.state_dict().items() if "lora_" not in k}

    def on_train_end(self, trainer, pl_module):
        self.trained = {id(p) for p in pl_module.parameters() if p.requires_grad}
        self.held = [id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        self.optimizers = list(trainer.optimizers)
        self.after = {k: v.clone() for k, v in pl_module.state_dict().items() if "lora_" not in k}
        self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        with torch.no_grad():
            self.logits = pl_module.eval()(TOKENS)
        pl_module.train()


def bases(module: nn.Module) -> set[type]:
    return {type(layer.base_layer) for layer in adapted_layers(module).values()}


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_fit_trains_the_adapters_alone_and_merges(module, trainer, quantization):
    keys, watch = list(module.state_dict()), Watch()
    trainer(watch, LoRACallback(r=4, quantization=quantization)).fit(module, loader(), loader())
    assert module.losses[-1] < module.losses[0]
    assert set(watch.held) == watch.trained
    assert len(watch.held) == len(watch.trained) == 12
    assert type(watch.optimizers[0]) is FlatPagedAdamW8bit
    assert all(torch.equal(watch.after[name], tensor) for name, tensor in watch.base.items())
    assert any("base_layer.codes" in name for name in watch.base) is (quantization == "nf4")
    assert list(module.state_dict()) == keys
    assert not adapted_layers(module)
    with torch.no_grad():
        assert relative_difference(module.eval()(TOKENS), watch.logits) <= 1e-5  # fp32, another order of summation


def same_module() -> Module:
    """What the fixture gives, built anew as in another process."""
    torch.manual_seed(0)
    return Module()


class InSetup(Module):
    def __init__(self):
        super().__init__(nn.Identity())

    def setup(self, stage):
        torch.manual_seed(0)  # as if the weights of a base were loaded here
        self.net = Net()


class InConfigureModel(Module):
    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = Net()


@pytest.mark.parametrize("kind", [Module, InSetup, InConfigureModel])
def test_models_are_adapted_wherever_they_are_built(kind, trainer):
    module, watch = kind(), Watch()
    trainer(watch, LoRACallback(r=4), max_epochs=1).fit(module, loader())
    assert len(watch.trained) == 12
    assert sum("base_layer.codes" in name for name in watch.base) == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_and_merges(module, trainer, precision):
    watch = Watch()
    trainer(watch, LoRACallback(r=4), precision=precision, max_epochs=1).fit(module, loader_in(precision))
    assert len(watch.trained) == 12
    with torch.no_grad():
        merged = module.eval()(TOKENS)
    # bf16-true computes, and stores the merged weight, in 8 bits; the others sum in fp32 or better
    assert relative_difference(merged.double(), watch.logits.double()) <= (0.05 if precision == "bf16-true" else 1e-5)


def loader_in(precision: str):
    data = loader()
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    data.dataset.tensors = (data.dataset.tensors[0], data.dataset.tensors[1].to(dtype))
    return data


def test_updates_below_a_step_of_bf16_are_kept_under_bf16_true(trainer):
    """The adapters are the master weights: 1.0 in bf16 is followed by 1.0078."""

    class Still(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    class Set(Callback):
        def on_train_start(self, trainer, pl_module):
            for layer in adapted_layers(pl_module).values():
                torch.nn.init.ones_(layer.adapter("default").lora_B)

    module, watch = Still(), Watch()
    trainer(Set(), watch, LoRACallback(r=4), precision="bf16-true", max_epochs=1).fit(module, loader_in("bf16-true"))
    changed = [(watch.state[key] != 1).any().item() for key in watch.state if key.endswith("lora_B")]
    assert changed == [True] * 6


# Checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_every_checkpoint_holds_adapters_alone(module, trainer, tmp_path, weights_only, quantization):
    saver = ModelCheckpoint(tmp_path / "ckpt", save_weights_only=weights_only, save_last=True)
    run = trainer(LoRACallback(r=4, train="head", quantization=quantization), saver)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
    for path in [*(tmp_path / "ckpt").iterdir(), tmp_path / "after.ckpt"]:
        checkpoint = torch.load(path, weights_only=True)
        keys = set(checkpoint["state_dict"])
        assert {key for key in keys if ".adapters.default.lora_" not in key} == {"net.head.weight", "net.head.bias"}
        assert len(keys) == 14
        assert checkpoint["lightning_lora"]["r"] == 4
        assert checkpoint["lightning_lora"]["targets"] == sorted(checkpoint["lightning_lora"]["targets"])
        assert ("optimizer_states" in checkpoint) is not weights_only
    assert len(list((tmp_path / "ckpt").iterdir())) == 2


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_biases_are_trained_saved_resumed_loaded_and_merged(trainer, quantization):
    def run(module: Module, epochs: int, **arguments) -> tuple[Module, Trainer]:
        lora = LoRACallback("up_proj", r=4, train_bias="adapted", quantization=quantization, merge=False)
        fit = trainer(lora, max_epochs=epochs)
        fit.fit(module, loader(), **arguments)
        return module, fit

    def fresh() -> Module:
        torch.manual_seed(0)
        return Module()

    names = {f"net.blocks.{i}.up_proj.base_layer.bias" for i in range(2)}
    whole, _ = run(fresh(), 2)
    half, first = run(fresh(), 1)
    path = first.checkpoint_callback.best_model_path
    keys = set(torch.load(path, weights_only=True)["state_dict"])
    assert {key for key in keys if "adapters" not in key} == names
    resumed, _ = run(fresh(), 2, ckpt_path=path)
    state, base = whole.state_dict(), fresh().state_dict()
    assert all(torch.equal(state[name], resumed.state_dict()[name]) for name in state)
    assert not any(torch.equal(state[name], base[name.replace("base_layer.", "")]) for name in names)
    torch.manual_seed(0)
    loaded = load_from_checkpoint(Module, path)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad and "adapters" not in name} == names
    assert all(torch.equal(loaded.state_dict()[name], half.state_dict()[name]) for name in names)
    with pytest.raises(AdapterError, match=r"train: none only there, .*bias.* only here"):
        trainer(LoRACallback("up_proj", r=4, quantization=quantization), max_epochs=3).fit(whole, loader())
    with pytest.raises(ValueError, match="train_bias must be one of none, adapted, all, got 'lora_only'"):
        LoRACallback(train_bias="lora_only")
    with pytest.raises(ValueError, match="brings its own train_bias"):
        LoRACallback(adapter="somewhere", train_bias="all")


def test_a_checkpoint_is_as_small_as_adapters_and_optimizer(trainer, tmp_path):
    module = Module(Net(width=256, depth=3))
    run = trainer(LoRACallback(r=16), max_epochs=1)
    run.fit(module, loader())
    path = run.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    elements = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    moments = 2 + 2 * 4 / 256  # two bytes, and two scales in float32 for each block of 256
    assert Path(path).stat().st_size <= 1.10 * (4 + moments) * elements


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", None])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(trainer, tmp_path, quantization, optimizer):
    """With dropout, shuffling and a schedule, at an epoch boundary."""

    def run(epochs: int, ckpt_path=None) -> tuple[Module, Watch]:
        torch.manual_seed(0)
        module, watch = Module(), Watch()
        if ckpt_path is not None:
            torch.manual_seed(123)  # whatever the new process has drawn so far
        lora = LoRACallback(r=4, dropout=0.2, quantization=quantization, optimizer=optimizer)
        made = trainer(watch, lora, ModelCheckpoint(tmp_path, filename=f"{epochs}"), max_epochs=epochs)
        made.fit(module, loader(shuffle=True), loader(), ckpt_path=ckpt_path)
        return module, watch

    straight, straight_watch = run(4)
    run(2)
    resumed, resumed_watch = run(4, tmp_path / "2.ckpt")
    assert resumed.losses == straight.losses[8:]
    assert all(torch.equal(resumed_watch.state[key], tensor) for key, tensor in straight_watch.state.items())
    states = [w.optimizers[0].state_dict()["state"] for w in (straight_watch, resumed_watch)]
    assert torch.equal(*(torch.cat([t.flatten().float() for t in flatten(state)]) for state in states))


def flatten(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in flatten(value)] if isinstance(state, dict) else []


def test_the_best_checkpoint_is_tested_after_the_merge_without_adding_it_twice(module, trainer):
    watch, lora = Watch(), LoRACallback(r=4)
    run = trainer(watch, lora)
    run.fit(module, loader(), loader())
    with torch.no_grad():
        merged = module.eval()(TOKENS)
    predicted = run.predict(module, loader(), ckpt_path="best")
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert not adapted_layers(module)
    with torch.no_grad():
        assert torch.equal(module.eval()(TOKENS), merged)  # the last epoch is the best: there is one checkpoint
        assert torch.allclose(predicted[0], module(next(iter(loader()))[0]), atol=1e-5)


def test_a_fresh_process_tests_an_adapter_checkpoint(module, trainer):
    run = trainer(LoRACallback(r=4))
    run.fit(module, loader())
    fresh = Module(Net())
    fresh.load_state_dict(Module().state_dict())
    torch.manual_seed(0)
    again = Module()
    predicted = trainer(LoRACallback(r=4)).predict(again, loader(), ckpt_path=run.checkpoint_callback.best_model_path)
    with torch.no_grad():
        assert torch.allclose(predicted[0], module.eval()(next(iter(loader()))[0]), atol=1e-5)


def test_a_second_fit_goes_on_with_the_same_adapters(module, trainer):
    watch, lora = Watch(), LoRACallback(r=4)
    run = trainer(watch, lora, max_epochs=1)
    run.fit(module, loader())
    base, state = watch.base, watch.state
    run.fit_loop.max_epochs = 2
    first = len(module.losses)
    with torch.no_grad():
        merged_loss = (module(next(iter(loader()))[0]) - next(iter(loader()))[1][:, None]).square().mean().item()
    run.fit(module, loader())
    assert module.losses[first] == pytest.approx(merged_loss, rel=1e-4)
    assert all(torch.equal(watch.base[name], tensor) for name, tensor in base.items())
    assert any(not torch.equal(watch.state[name], tensor) for name, tensor in state.items() if "lora_" in name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, "r is 4 there and 8 here"),
        ({"r": 4, "targets": "q_proj"}, "targets: .*only there"),
        ({"r": 4, "quantization": None}, "quantization is 'nf4/64 double-quantized' there and 'none' here"),
        ({"r": 4, "alpha": 8.0}, r"alpha is 32\.0 there and 8\.0 here"),
        ({"r": 4, "train": "head"}, "train: none only there, net.head only here"),
    ],
)
def test_a_checkpoint_of_another_fine_tune_is_refused_naming_both(module, trainer, settings, said):
    run = trainer(LoRACallback(r=4), max_epochs=1)
    run.fit(module, loader())
    with pytest.raises(CheckpointError, match=said):
        trainer(LoRACallback(**settings)).fit(
            same_module(), loader(), ckpt_path=run.checkpoint_callback.best_model_path
        )


def test_a_full_checkpoint_is_refused_with_the_way_to_load_it(module, trainer, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(CheckpointError, match=r"not written by LoRACallback.*load_from_checkpoint"):
        trainer(LoRACallback(r=4)).fit(Module(), loader(), ckpt_path=tmp_path / "full.ckpt")


# The end of a run


def test_output_dir_gets_the_adapter_and_the_merged_weights(module, trainer, tmp_path):
    torch.manual_seed(0)
    untouched = Module().net
    untouched.load_state_dict(module.net.state_dict())
    trainer(LoRACallback(r=4, output_dir=tmp_path / "out", quantization=None)).fit(module, loader())
    with torch.no_grad():
        expected = module.net.eval()(TOKENS)
        loaded = load_adapter(copy.deepcopy(untouched), tmp_path / "out").eval()
        assert torch.allclose(loaded(TOKENS), expected, atol=1e-5)
    from safetensors.torch import load_file

    untouched.load_state_dict(load_file(tmp_path / "out" / "merged" / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(untouched.eval()(TOKENS), expected)


def test_a_run_starts_from_a_saved_adapter(module, trainer, tmp_path):
    torch.manual_seed(0)
    base = copy.deepcopy(module)
    trainer(LoRACallback(r=4, output_dir=tmp_path, quantization=None)).fit(module, loader())
    with torch.no_grad():
        expected = module.eval()(TOKENS)
        trainer(LoRACallback(adapter=tmp_path, quantization=None), max_epochs=0).fit(base, loader())
        assert torch.allclose(base.eval()(TOKENS), expected, atol=1e-5)
    with pytest.raises(ValueError, match="brings its own r, targets; drop these arguments"):
        LoRACallback("q_proj", r=2, adapter=tmp_path)


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"max_epochs": 0}])
def test_nothing_is_merged_when_nothing_was_trained(module, trainer, tmp_path, settings):
    trainer(LoRACallback(r=4, output_dir=tmp_path / "out"), **settings).fit(module, loader())
    assert adapted_layers(module)
    assert not (tmp_path / "out").exists()


def test_without_merge_the_module_stays_adapted(module, trainer):
    watch = Watch()
    trainer(watch, LoRACallback(r=4, merge=False)).fit(module, loader())
    assert len(adapted_layers(module)) == 6
    with torch.no_grad():
        assert torch.equal(module.eval()(TOKENS), watch.logits)
    again = trainer(LoRACallback(r=4, merge=False))
    again.validate(module, loader(), verbose=False)
    with pytest.raises(AdapterError, match=r"holds adapters already.*r is 8 there and 4 here"):
        trainer(LoRACallback(r=8)).validate(module, loader(), verbose=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_the_module_is_left_clean_and_picklable(module, trainer, clone):
    attributes = set(vars(module))
    trainer(LoRACallback(r=4)).fit(module, loader())
    assert set(vars(module)) - attributes <= {"_hparams"}  # Lightning's own
    module.trainer = None
    twin = clone(module)
    with torch.no_grad():
        assert torch.equal(twin.eval()(TOKENS), module.eval()(TOKENS))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_made_within_a_run_are_no_part_of_it(module, trainer, clone):
    class Copies(Callback):
        def setup(self, trainer, pl_module, stage):
            self.module = clone(pl_module)

        def on_train_batch_end(self, *_):
            self.lora = clone(lora)

    lora, copies = LoRACallback(r=4), Copies()
    torch.manual_seed(1)
    trainer(lora, copies, max_epochs=1).fit(module, loader())
    assert not adapted_layers(module)
    copies.module.configure_model()
    assert not adapted_layers(copies.module)
    assert copies.lora._undo == []
    assert "log" not in vars(copies.lora)  # Lightning's, and through it the module
    torch.manual_seed(1)
    trainer(copies.lora, max_epochs=1).fit(copies.module, loader())
    assert copies.module.losses == module.losses


def test_an_exception_leaves_the_module_adapted_and_its_methods_clean(module, trainer):
    class Fails(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="power"):
        trainer(LoRACallback(r=4), Fails()).fit(module, loader())
    assert "configure_model" not in vars(module)
    assert bases(module) == {NF4Linear}


def test_a_diverged_training_keeps_its_adapters_and_says_so(module, trainer):
    class Spoil(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                next(iter(adapted_layers(pl_module).values())).adapter("default").lora_B[0, 0] = float("nan")

    with pytest.raises(MergeError, match=r"nothing was merged. A NaN comes from a diverged training"):
        trainer(Spoil(), LoRACallback(r=4)).fit(module, loader())
    assert len(adapted_layers(module)) == 6


# Set-ups that cannot work are refused before the first step


class NoGradient(Module):
    def training_step(self, batch, _):
        with torch.no_grad():
            hidden = self(batch[0])
        return self.net.head.weight.sum() + hidden.mean() if self.net.head.weight.requires_grad else hidden.mean()


class SkipsLayer(Module):
    def __init__(self):
        super().__init__()
        self.net.unused = nn.Linear(64, 64)
        self.net.last = nn.Linear(4, 4)


class OnlyTheEmbedding(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.embed.parameters())


@pytest.mark.parametrize(
    ("kind", "settings", "error", "said"),
    [
        (Module, {"targets": ["q_proj", "v_proj"]}, TargetError, "target 'v_proj' matches no linear layer"),
        (Module, {"r": 65}, TargetError, r"net.blocks.0.q_proj: r=65 is more than the full rank 64"),
        (OnlyTheEmbedding, {}, OptimizerError, "holds no adapter"),
        (NoGradient, {}, GradientError, "the loss depends on no adapter.*use_reentrant=False"),
        (NoGradient, {"train": "head"}, GradientError, "no gradient reached 12 of 12 adapter tensors"),
        (SkipsLayer, {}, GradientError, r"no gradient reached 2 of 16 .*net.unused.*exclude="),
    ],
)
def test_what_cannot_train_is_an_error_before_the_first_step(trainer, kind, settings, error, said):
    module = kind()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(error, match=said):
        trainer(LoRACallback(**{"r": 4, "quantization": None, **settings})).fit(module, loader())
    after = {name.replace(".base_layer", ""): p for name, p in module.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_a_base_weight_that_is_not_finite_is_named_before_anything_changes(module, trainer):
    with torch.no_grad():
        module.net.downs[0].weight[0, 0] = float("inf")
    for quantization in ("nf4", None):
        with pytest.raises(TargetError, match=r"base weight of net\.downs\.0 holds NaN or infinity"):
            trainer(LoRACallback(r=4, quantization=quantization)).fit(module, loader())
    assert not adapted_layers(module)


def test_a_base_that_nf4_cannot_hold_is_refused_before_anything_changes(trainer):
    module = Module(nn.Sequential(nn.Embedding(16, 63), nn.Linear(63, 63), nn.Linear(63, 8)))
    before = list(module.state_dict())
    with pytest.raises(QuantizationError, match="none of the 1 adapted layers can be held in NF4"):
        trainer(LoRACallback(r=4)).fit(module, loader())
    assert list(module.state_dict()) == before
    assert all(p.requires_grad for p in module.parameters())


def test_a_trainer_of_the_other_package_is_refused_with_what_to_import(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    model = pytest.importorskip("pytorch_lightning.demos.boring_classes").BoringModel()
    run = other.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[LoRACallback(r=2)]
    )
    with pytest.raises(UnsupportedError, match=r"is from pytorch_lightning.*from lightning\.pytorch"):
        run.fit(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ia3"}, "method must be one of lora, dora, lora_fa, vera, freeze, full, got 'ia3'"),
        (
            {"method": "vera", "alpha": 16.0},
            "method='vera' does not have alpha=16.0; it has r, dropout, d_initial, seed",
        ),
        ({"method": "dora", "adapter": "x"}, "adapter='x' brings its own method"),
        ({"lr_ratio": 0}, "lr_ratio must be finite and above 0"),
        ({"method": "full", "lr_ratio": 16}, "method='full' has no factors A and B"),
        ({"quantization": "nf5"}, "quantization must be one of auto, nf4, fp4, nf3, nf2, int8, got 'nf5'"),
        ({"optimizer": "adamw"}, "optimizer must be one of paged_adamw_8bit, galore_adamw, badam, got 'adamw'"),
        ({"targets": {"q_proj": {"rank": 4}}}, r"targets\['q_proj'\] has rank; fields are r, alpha"),
    ],
)
def test_unknown_choices_are_refused_when_written(settings, said):
    with pytest.raises(ValueError, match=said):
        LoRACallback(**settings)


def test_targets_may_be_a_mapping_of_dicts_as_yaml_gives_them(module, trainer):
    lora = LoRACallback({"all-linear": {}, "q_proj": {"r": 2, "alpha": 4}}, r=4, merge=False, quantization=NF4Config())
    trainer(lora, max_epochs=1).fit(module, loader())
    configs = {name: layer.adapter("default").config for name, layer in adapted_layers(module).items()}
    assert configs["net.blocks.0.q_proj"] == LoRAConfig(r=2, alpha=4)
    assert configs["net.downs.1"] == LoRAConfig(r=4, alpha=32.0)


# Other ways of running


def test_lightnings_boring_model_trains(trainer):
    module = BoringModel()
    trainer(LoRACallback(r=2), fast_dev_run=True).fit(module)
    assert bases(module) == {NF4Linear}


def test_manual_optimization_with_two_optimizers(trainer):
    class Manual(Module):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.blocks.parameters(), 1e-2), torch.optim.Adam(
                self.net.downs.parameters(), 1e-2
            )

        def training_step(self, batch, _):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, _))
                optimizer.step()

    module, watch = Manual(), Watch()
    trainer(watch, LoRACallback(r=4)).fit(module, loader())
    assert [type(o) for o in watch.optimizers] == [FlatPagedAdamW8bit] * 2
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize(("train", "moves"), [((), False), ("norm", True)])
def test_batch_norm_statistics_move_only_where_the_norm_is_trained(trainer, train, moves):
    class Normed(LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 64), nn.Sequential(nn.BatchNorm1d(64)), nn.Linear(64, 8)

        def training_step(self, batch, _):
            return (self.last(self.norm(self.first(batch[0].float()))) - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Normed()
    before = {key: value.clone() for key, value in module.norm.state_dict().items()}
    trainer(LoRACallback("first", r=4, train=train)).fit(module, loader())
    same = [torch.equal(module.norm.state_dict()[key], value) for key, value in before.items()]
    assert not any(same) if moves else all(same)


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")  # Lightning's hint, and the point of the test
def test_adapter_dropout_is_active_over_a_base_that_comes_in_evaluation_mode(trainer):
    class Modes(Module):
        def training_step(self, batch, batch_idx):
            layers = adapted_layers(self).values()
            self.modes = {(layer.adapter("default").training, layer.base_layer.training) for layer in layers}
            return super().training_step(batch, batch_idx)

    module = Modes()
    module.net.eval()
    trainer(LoRACallback(r=4, dropout=0.1), max_epochs=1).fit(module, loader(), loader())
    assert module.modes == {(True, False)}


def test_reentrant_checkpointing_that_starves_the_adapters_is_caught(trainer):
    class Checkpointed(Module):
        def __init__(self, reentrant):
            super().__init__()
            self.reentrant = reentrant

        def forward(self, tokens):
            hidden = self.net.embed(tokens)
            block = nn.Sequential(self.net.blocks[0]["q_proj"], self.net.blocks[1]["q_proj"])
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=self.reentrant)
            return self.net.head(hidden)

    lora = {"targets": "q_proj", "r": 4, "train": "head"}
    trainer(LoRACallback(**lora)).fit(Checkpointed(False), loader())
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(GradientError, match=r"no gradient reached 4 of 4 .*use_reentrant=False"),
    ):
        trainer(LoRACallback(**lora)).fit(Checkpointed(True), loader())


# The same module in other hands


def test_a_new_callback_does_not_add_a_merged_adapter_again(module, trainer):
    run = trainer(LoRACallback(r=4))
    run.fit(module, loader())
    path = run.checkpoint_callback.best_model_path
    torch.manual_seed(0)
    expected = trainer(LoRACallback(r=4)).predict(Module(), loader(), ckpt_path=path)
    found = trainer(LoRACallback(r=4)).predict(module, loader(), ckpt_path=path)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert not adapted_layers(module)


def test_another_callback_in_the_same_trainer_still_saves_adapters_alone(trainer, tmp_path):
    run = trainer(LoRACallback(r=4), max_epochs=1)
    run.fit(Module(), loader())
    run.callbacks = [LoRACallback(r=4) if isinstance(other, LoRACallback) else other for other in run.callbacks]
    run.fit_loop.max_epochs = 2
    run.fit(Module(), loader())
    run.save_checkpoint(tmp_path / "second.ckpt", weights_only=False)
    assert all("lora_" in key for key in torch.load(tmp_path / "second.ckpt", weights_only=True)["state_dict"])


def test_a_module_merged_by_hand_is_saved_whole(module, trainer, tmp_path):
    run = trainer(LoRACallback(r=4, merge=False), max_epochs=1)
    run.fit(module, loader())
    merge(module)
    run.save_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    assert Module.load_from_checkpoint(tmp_path / "whole.ckpt")


def test_the_callback_is_picklable_after_a_run(module, trainer):
    lora = LoRACallback(r=4)
    trainer(lora, max_epochs=1).fit(module, loader())
    assert pickle.loads(pickle.dumps(lora)).settings == copy.deepcopy(lora).settings == lora.settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "quantization is 'nf4' there and 'none' here"),
        ({"quantization": None, "dropout": 0.5}, "dropout: 0.5 only there, 0 only here"),
        ({"quantization": None, "train": "head"}, "train: .*net.head.weight only there"),
    ],
)
def test_settings_a_module_with_adapters_does_not_have_are_refused(module, trainer, settings, said):
    inject(module, config=LoRAConfig(r=4))
    with pytest.raises(AdapterError, match=said):
        trainer(LoRACallback(r=4, **settings)).fit(module, loader())


@pytest.mark.filterwarnings("ignore::Warning")  # dynamo's own, about autograd functions and lru_cache
def test_a_compiled_network_goes_through_fit_test_and_a_second_fit(trainer):
    module = Module(torch.compile(Net(), backend="eager"))
    run = trainer(LoRACallback(r=4, train="head"), max_epochs=1)
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path="best", verbose=False)
    trainer(LoRACallback(r=4, train="head"), max_epochs=1).fit(module, loader())
    assert not adapted_layers(module)


def test_weights_loaded_after_the_merge_are_what_the_next_fit_starts_from(module, trainer):
    base, lora = copy.deepcopy(module.state_dict()), LoRACallback(r=4)
    trainer(lora).fit(module, loader())
    module.load_state_dict(base)
    trainer(lora).fit(module, loader())
    assert module.losses[8] == module.losses[0]


def test_a_network_rebuilt_in_setup_is_tested_from_its_checkpoint(trainer):
    module = InSetup()
    run = trainer(LoRACallback(r=4))
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert len(adapted_layers(module)) == 6


@pytest.mark.parametrize("first", ["paged_adamw_8bit", None])
def test_a_checkpoint_of_another_optimizer_is_refused_naming_both(module, trainer, first):
    run = trainer(LoRACallback(r=4, optimizer=first), max_epochs=1)
    run.fit(module, loader())
    second = None if first else "paged_adamw_8bit"
    with pytest.raises(CheckpointError, match=r"holds the state of .*AdamW.*, this run uses .*AdamW"):
        trainer(LoRACallback(r=4, optimizer=second)).fit(
            same_module(), loader(), ckpt_path=run.checkpoint_callback.best_model_path
        )


def test_a_checkpoint_of_the_paged_adamw_of_bitsandbytes_is_taken_up_and_not_the_other_way_round():
    theirs, ours = "bitsandbytes.optim.PagedAdamW8bit", "lightning_lora.optim.FlatPagedAdamW8bit"
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    check_optimizers({"lightning_lora": {"optimizers": [theirs]}}, [FlatPagedAdamW8bit(parameters)])
    with pytest.raises(CheckpointError, match=f"the state of {ours}, this run uses {theirs}"):
        check_optimizers({"lightning_lora": {"optimizers": [ours]}}, [bitsandbytes.optim.PagedAdamW8bit(parameters)])


def test_a_failed_test_leaves_the_module_merged(module, trainer):
    class Fails(Callback):
        def on_test_batch_end(self, *_):
            raise RuntimeError("the power went out")

    run = trainer(LoRACallback(r=4), Fails())
    run.fit(module, loader())
    with pytest.raises(RuntimeError, match="power"):
        run.test(module, loader(), ckpt_path="best", verbose=False)
    assert not adapted_layers(module)


def test_numbers_from_numpy_can_be_saved_and_resumed(module, trainer):
    run = trainer(LoRACallback(r=np.int64(4), alpha=np.float32(8)), max_epochs=1)
    run.fit(module, loader())
    trainer(LoRACallback(r=4, alpha=8)).fit(same_module(), loader(), ckpt_path=run.checkpoint_callback.best_model_path)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_layers_that_the_module_has_under_two_names_go_through_a_whole_run(trainer, tmp_path, quantization):
    """As in ``self.blocks = self.net.blocks``; a checkpoint holds their adapters once, also after the merge."""

    class Named(Module):
        def __init__(self):
            super().__init__()
            self.blocks = self.net.blocks

    def make():
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1000)
        return trainer(LoRACallback(r=4, quantization=quantization), saver)

    torch.manual_seed(0)
    module = Named()
    again = copy.deepcopy(module)
    keys = list(module.state_dict())
    make().fit(module, loader())
    assert module.blocks[0]["q_proj"] is module.net.blocks[0]["q_proj"]
    assert list(module.state_dict()) == keys
    assert len(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == 12
    predicted = make().predict(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    with torch.no_grad():
        assert relative_difference(predicted[0], module.eval()(next(iter(loader()))[0])) <= 1e-5  # fp32, other order
    make().fit(module.train(), loader())
    assert not adapted_layers(module)


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("between", [LightningModule.freeze, LightningModule.unfreeze])
def test_what_was_frozen_or_unfrozen_between_two_fits_changes_nothing(trainer, between, merged, quantization):
    """The base stays the base; it is not saved, so it must not be trained."""

    class Filtered(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def run(act) -> tuple[Module, Watch]:
        torch.manual_seed(0)
        module, watch = Filtered(), Watch()
        lora = LoRACallback(r=4, train="head", merge=merged, quantization=quantization)
        trainer(lora, max_epochs=1).fit(module, loader())
        act(module)
        trainer(watch, lora, max_epochs=1).fit(module.train(), loader())
        assert all(torch.equal(watch.after[name], base) for name, base in watch.base.items() if "net.head" not in name)
        return module, watch

    (plain, seen), (module, watch) = run(lambda module: None), run(between)
    assert len(watch.held) == len(watch.trained) == len(seen.held) == 14
    assert module.losses == plain.losses


def test_a_base_that_configure_optimizers_unfreezes_stays_frozen(trainer):
    class Unfreezes(Module):
        def configure_optimizers(self):
            self.unfreeze()
            return super().configure_optimizers()

    watch = Watch()
    trainer(watch, LoRACallback(r=4, quantization=None), max_epochs=1).fit(Unfreezes(), loader())
    assert len(watch.held) == len(watch.trained) == 12
    assert all(torch.equal(watch.after[name], base) for name, base in watch.base.items())


@pytest.mark.filterwarnings("ignore::Warning")  # dynamo's own, about autograd functions and lru_cache
def test_checkpoints_of_compiled_and_plain_submodules_are_the_same(trainer):
    def compiled() -> Module:
        torch.manual_seed(0)
        return Module(torch.compile(Net(), backend="eager"))

    run = trainer(LoRACallback(r=4), max_epochs=1)
    run.fit(compiled(), loader())
    path = run.checkpoint_callback.best_model_path
    keys = torch.load(path, weights_only=True)["state_dict"]
    assert not [key for key in keys if "_orig_mod" in key]
    torch.manual_seed(0)
    trainer(LoRACallback(r=4), max_epochs=2).fit(Module(), loader(), ckpt_path=path)
    trainer(LoRACallback(r=4), max_epochs=2).fit(compiled(), loader(), ckpt_path=path)


def test_a_module_that_configures_no_optimizer_is_told_so(trainer):
    class Without(Module):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="configure_optimizers. returned .None"),
        pytest.raises(OptimizerError, match="configure_optimizers returns None, so nothing would be trained"),
    ):
        trainer(LoRACallback(r=4)).fit(Without(), loader())
