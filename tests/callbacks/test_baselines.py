"""Freezing and full fine-tuning go through the same run as LoRA: a comparison changes one word."""

import copy
import shutil

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    AdapterError,
    CheckpointError,
    LoRACallback,
    LoRAStrategy,
    NF4Config,
    TargetError,
    UnsupportedError,
    inject,
    load_from_checkpoint,
    quantize,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from tests.conftest import Net
from tests.runs import Module, fresh, loader

METHODS = ["lora", "freeze", "full"]
TOKENS = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(2))


def changed(module: nn.Module) -> set[str]:
    """Names of the tensors that are not what they were at the start."""
    start = fresh().state_dict()
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, start[name])}


def saver(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="val", filename="best", save_last=True)


def everything(trainer, folder, method: str) -> dict:
    """Fit, checkpoint, resume, test the best, fit again: what a user does with one method."""
    straight = fresh()
    trainer(LoRACallback(method=method, train="head"), max_epochs=3).fit(straight, loader(shuffle=True), loader())
    module, keep = fresh(), saver(folder / method)
    run = trainer(LoRACallback(method=method, train="head"), keep, max_epochs=2)
    run.fit(module, loader(shuffle=True), loader())
    scores = run.test(module, loader(), ckpt_path="best", verbose=False)
    path, score, resumed = shutil.copy(keep.last_model_path, folder), keep.best_model_score.item(), fresh()
    more = trainer(LoRACallback(method=method, train="head"), saver(folder / method), max_epochs=3)
    more.fit(resumed, loader(shuffle=True), loader(), ckpt_path=keep.last_model_path)
    again = trainer(LoRACallback(method=method, train="head"), max_epochs=1)
    first = len(module.losses)
    again.fit(module, loader(), loader())
    return {
        "straight": straight,
        "resumed": resumed,
        "best": scores[0]["val"],
        "saved": score,
        "checkpoint": torch.load(path, weights_only=True),
        "path": path,
        "again": module.losses[first:],
        "losses": module.losses[:first],
        "keys": list(module.state_dict()),
    }


@pytest.mark.parametrize("method", METHODS)
def test_one_word_changes_the_method_and_the_run_stays_the_same(trainer, tmp_path, method):
    run = everything(trainer, tmp_path, method)
    assert run["losses"][-1] < run["losses"][0]
    assert run["best"] == pytest.approx(run["saved"], rel=1e-5)  # the test of LoRA's best runs on the same adapters
    for name, tensor in run["straight"].state_dict().items():  # resumed at an epoch boundary, bit for bit
        assert torch.equal(tensor, run["resumed"].state_dict()[name]), name
    assert run["again"][0] < run["losses"][0]  # a second fit goes on where the first ended
    assert run["keys"] == list(fresh().state_dict())
    assert run["checkpoint"]["lightning_lora"]["method"] == method


def test_freeze_trains_and_saves_the_named_modules_alone(trainer, tmp_path):
    run = everything(trainer, tmp_path, "freeze")
    assert changed(run["straight"]) == {"net.head.weight", "net.head.bias"}
    assert set(run["checkpoint"]["state_dict"]) == {"net.head.weight", "net.head.bias"}
    trained = {name for name, p in run["straight"].named_parameters() if p.requires_grad}
    assert trained == {"net.head.weight", "net.head.bias"}


def test_full_trains_and_saves_everything(trainer, tmp_path):
    run = everything(trainer, tmp_path, "full")
    assert changed(run["straight"]) == set(fresh().state_dict())
    assert list(run["checkpoint"]["state_dict"]) == list(fresh().state_dict())
    loaded = Module.load_from_checkpoint(run["path"], map_location="cpu")  # Lightning's own: the file is whole
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in run["checkpoint"]["state_dict"].items())


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_loaded_without_a_trainer(trainer, tmp_path, method):
    module, keep = fresh(), saver(tmp_path)
    run = trainer(LoRACallback(method=method, train="head", merge=False), keep)
    run.fit(module, loader(), loader())
    with torch.no_grad():
        expected = module.eval()(TOKENS)
    seed_everything(0, verbose=False)
    assert torch.equal(load_from_checkpoint(Module, keep.last_model_path)(TOKENS), expected)


@pytest.mark.parametrize("method", ["freeze", "full"])
def test_it_is_what_lightning_trains_without_the_callback(trainer, method):
    """With the same optimizer: the losses are those of a plain Trainer over the same parameters, bit for bit."""
    module, plain = fresh(), fresh()
    trainer(LoRACallback(method=method, train="head", optimizer=None)).fit(module, loader())
    if method == "freeze":
        plain.requires_grad_(False).net.head.requires_grad_(True)
    trainer().fit(plain, loader())
    assert module.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(("method", "count"), [("freeze", 2), ("full", 15)])
def test_the_optimizer_holds_what_is_trained_and_is_swapped_like_loras(trainer, method, count):
    run = trainer(LoRACallback(method=method, train="head"))
    run.fit(fresh(), loader())
    assert type(run.optimizers[0]) is FlatPagedAdamW8bit
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == count


@pytest.mark.parametrize("method", ["freeze", "full"])
def test_the_trained_weights_are_written_where_the_merged_ones_would_be(trainer, tmp_path, method):
    module = fresh()
    trainer(LoRACallback(method=method, train="head", output_dir=tmp_path / "out", merge=False)).fit(module, loader())
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["merged", "model.safetensors"]
    written = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in module.net.state_dict().items())


class Normed(Module):
    """With statistics that a run may or may not update."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(Net(), nn.Flatten(), nn.BatchNorm1d(48, affine=False), nn.Linear(48, 8)))


@pytest.mark.parametrize("method", METHODS)
def test_statistics_move_with_what_is_trained(trainer, method):
    """The layer has no parameters of its own, so that whether these are frozen would not tell."""
    seed_everything(0, verbose=False)
    module = Normed()
    trainer(LoRACallback(method=method, train="net.3", exclude="net.0.head" if method == "lora" else ())).fit(
        module, loader()
    )
    assert bool(module.net[2].num_batches_tracked) is (method == "full")


def test_averages_of_full_training_are_whole_too(trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    averager = EMAWeightAveraging(decay=0.5)
    module = fresh()
    trainer(LoRACallback(method="full"), averager, keep, max_epochs=1).fit(module, loader())
    checkpoint = torch.load(keep.last_model_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(checkpoint["current_model_state"]) == list(fresh().state_dict())


def test_strategies_take_the_methods_too(trainer):
    module = fresh()
    trainer(strategy=LoRAStrategy(method="freeze", train="head"), max_epochs=1).fit(module, loader())
    assert changed(module) == {"net.head.weight", "net.head.bias"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "full", "r": 8}, "method='full' puts no adapters .* no use for r; drop these"),
        ({"method": "full", "quantization": "nf4"}, "no use for quantization"),
        ({"method": "freeze", "train": "head", "quantization": NF4Config()}, "no use for quantization"),
        ({"method": "freeze", "train": "head", "targets": "q_proj"}, "no use for targets"),
        ({"method": "freeze", "train": "head", "exclude": "q_proj"}, "no use for exclude"),
        ({"method": "freeze", "train": "head", "train_bias": "all"}, "no use for train_bias"),
        ({"method": "full", "train_bias": "adapted"}, "no use for train_bias"),
        ({"method": "full", "train_bias": "some"}, "train_bias must be one of none, adapted, all, got 'some'"),
        ({"method": "full", "adapter": "folder", "dropout": 0.1}, "no use for dropout, adapter"),
        ({"method": "full", "scaling": "rslora", "alpha": 3}, "no use for alpha, scaling"),
        ({"method": "freeze"}, "method='freeze' trains what train= names and nothing else"),
        ({"method": "frozen"}, "method must be one of lora, dora, lora_fa, vera, freeze, full, got 'frozen'"),
        ({"quantization": "nf5"}, "quantization must be one of auto, nf4"),
    ],
)
def test_arguments_of_no_use_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        LoRACallback(**arguments)


def test_the_default_storage_is_nf4_under_adapters_and_none_without():
    assert LoRACallback().settings.quantization == NF4Config()
    assert LoRACallback(quantization=None).settings.quantization is None
    assert LoRACallback(method="full", quantization=None).settings.quantization is None
    assert LoRACallback(method="full").settings.quantization is None


def test_a_module_goes_on_with_its_own_method_alone(trainer):
    tuned = {}
    for method in METHODS:
        tuned[method] = fresh()
        trainer(LoRACallback(method=method, train="head"), max_epochs=1).fit(tuned[method], loader())
    for method, module in tuned.items():
        for other in set(METHODS) - {method}:
            before = copy.deepcopy(module.state_dict())
            with pytest.raises(AdapterError, match="trained before"):
                trainer(LoRACallback(method=other, train="head")).fit(module, loader())
            assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    anew = copy.deepcopy(tuned["full"])
    trainer(LoRACallback(r=4), max_epochs=1).fit(anew, loader())
    with pytest.raises(AdapterError, match=r"train: net\.norm only there, net\.head only here"):
        trainer(LoRACallback(method="freeze", train="norm")).fit(tuned["freeze"], loader())


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_method_is_refused(trainer, tmp_path, method):
    keep = saver(tmp_path)
    trainer(LoRACallback(method=method, train="head"), keep, max_epochs=1).fit(fresh(), loader(), loader())
    for other in set(METHODS) - {method}:
        with pytest.raises(CheckpointError, match=f"method is '{method}' there and '{other}' here"):
            trainer(LoRACallback(method=other, train="head")).fit(fresh(), loader(), ckpt_path=keep.last_model_path)


def test_what_cannot_be_trained_is_named_before_anything_is_frozen(trainer):
    module = fresh()
    quantize(inject(module.net, "q_proj"))
    with pytest.raises(AdapterError, match="the module holds adapters, which method='full' knows nothing of"):
        trainer(LoRACallback(method="full")).fit(module, loader())
    packed = fresh()
    packed.net.blocks[0]["q_proj"] = module.net.blocks[0]["q_proj"].base_layer
    with pytest.raises(UnsupportedError, match=r"net\.blocks\.0\.q_proj is stored in few bits"):
        trainer(LoRACallback(method="full")).fit(packed, loader())
    assert all(p.requires_grad for p in packed.parameters())
    trainer(LoRACallback(method="freeze", train="head"), max_epochs=1).fit(packed, loader())
    with pytest.raises(TargetError, match=r"train 'heads' matches no module\. Closest: head"):
        trainer(LoRACallback(method="full", train="heads")).fit(fresh(), loader())
    assert not adapted_layers(packed)


def test_a_checkpoint_of_a_frozen_base_is_refused_over_another_one(trainer, tmp_path):
    keep = saver(tmp_path)
    trainer(LoRACallback(method="freeze", train="head"), keep, max_epochs=1).fit(fresh(), loader(), loader())
    other = fresh()
    with torch.no_grad():
        other.net.blocks[0]["q_proj"].weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"another base model: .* net\.blocks\.0\.q_proj \(other values\)"):
        trainer(LoRACallback(method="freeze", train="head")).fit(other, loader(), ckpt_path=keep.last_model_path)
