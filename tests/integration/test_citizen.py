"""What a Lightning user may take for granted: twenty behaviours of a run with ``LoRACallback``, end to end.

Every test is of one behaviour and says its number; they stand in that order. Files that go deeper are named.
"""

import copy
import csv
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, BitsandbytesPrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterError,
    CheckpointError,
    LoRACallback,
    LoRAConfig,
    LoRAStrategy,
    OptimizerError,
    TargetError,
    UnsupportedError,
    inject,
    load_from_checkpoint,
    merge,
    quantize,
)
from lightning_lora.model.layers import adapted_layers
from lightning_lora.quantization.nf4 import NF4Linear
from tests.conftest import Net, relative_difference
from tests.runs import MakeTrainer, Module, loader, output, trainers_in

ADAPTED = {"net.blocks.0.q_proj", "net.blocks.0.up_proj", "net.blocks.1.q_proj", "net.blocks.1.up_proj"}
ADAPTED |= {"net.downs.0", "net.downs.1"}


def fresh(kind: type[LightningModule] = Module, *arguments) -> Any:
    """The same base every time."""
    torch.manual_seed(0)
    return kind(*arguments)


@pytest.fixture
def trainer(tmp_path) -> MakeTrainer:
    return trainers_in(tmp_path, max_epochs=1)


class Look(Callback):
    """What a run looks like from outside, before it is merged; to be put before ``LoRACallback``."""

    def on_train_start(self, trainer, pl_module):
        self.layers = set(adapted_layers(pl_module))
        self.before = state(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.after = state(pl_module)
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.optimizers = trainer.optimizers
        self.held = [names[id(p)] for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        self.output = output(pl_module)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def best(run: Trainer) -> str:
    return run.checkpoint_callback.best_model_path


# 1. Trained is what was asked for


class Rates(Callback):
    """The learning rates of every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append([group["lr"] for each in trainer.optimizers for group in each.param_groups])


class InSetup(Module):
    def __init__(self):
        super().__init__(nn.Identity())

    def setup(self, stage):
        if isinstance(self.net, nn.Identity):
            self.net = fresh(Net)


class InConfigureModel(Module):
    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = fresh(Net)


class FromMeta(Module):
    """Built without memory, and given its weights in ``configure_model``."""

    def __init__(self):
        with torch.device("meta"):
            super().__init__(Net())

    def configure_model(self):
        if self.net.head.weight.is_meta:
            self.net.load_state_dict(fresh(Net).state_dict(), assign=True)


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("kind", [Module, InSetup, InConfigureModel, FromMeta])
def test_adapters_and_train_modules_alone_are_trained_wherever_the_model_is_built(trainer, kind, quantization):
    """Behaviour 1. The base is the one that was built, bit for bit, or exactly its NF4 form."""
    base, look = fresh(Net).state_dict(), Look()
    trainer(look, LoRACallback(r=4, train="head", quantization=quantization)).fit(fresh(kind), loader(), loader())
    assert look.layers == ADAPTED
    expected = {f"{name}.adapters.default.lora_{x}" for name in ADAPTED for x in "AB"}
    assert look.trained == expected | {"net.head.weight", "net.head.bias"}
    assert sorted(look.held) == sorted(look.trained)
    assert all(not torch.equal(look.after[name], look.before[name]) for name in look.trained)
    for name, tensor in base.items():
        layer, _, field = f"net.{name}".rpartition(".")
        if layer == "net.head":
            continue
        if layer not in ADAPTED or quantization is None or field == "bias":
            key = f"{layer}.base_layer.{field}" if layer in ADAPTED else f"{layer}.{field}"
            assert torch.equal(look.after[key], tensor)
            continue
        codes, form = bitsandbytes.functional.quantize_4bit(
            tensor, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(look.after[f"{layer}.base_layer.codes"], codes.flatten())
        assert torch.equal(look.after[f"{layer}.base_layer.absmax"], form.absmax)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_model_built_under_the_precision_of_the_trainer_is_adapted_in_it(trainer, quantization):
    """Behaviour 1. In ``configure_model`` new layers have the Trainer's dtype; adapters over them stay in fp32."""

    class Half(InConfigureModel):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0], batch[1].bfloat16()], batch_idx)

    module, look = Half(), Look()
    trainer(look, LoRACallback(r=4, quantization=quantization), precision="bf16-true").fit(module, loader())
    assert look.layers == ADAPTED
    assert {tensor.dtype for tensor in adapters(look.after).values()} == {torch.float32}
    base = {name: tensor for name, tensor in look.after.items() if name not in adapters(look.after)}
    assert {tensor.dtype for tensor in base.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert all(not torch.equal(look.after[name], look.before[name]) for name in look.trained if name.endswith("B"))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_model_left_without_weights_is_refused(trainer, stage):
    """Behaviour 1. On the meta device there is nothing to adapt, and nothing is changed."""

    class StaysMeta(FromMeta):
        def configure_model(self):
            pass

    module = StaysMeta()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor") as ended:
        getattr(trainer(LoRACallback(r=4)), stage)(module, loader())
    cause = ended.value.__context__  # Lightning moves the module to the CPU after any error, and fails in turn
    assert isinstance(cause, TargetError)
    assert re.search(r"net\.blocks\.0\.q_proj.* meta device.*assign=True", str(cause))
    assert not adapted_layers(module)
    assert "configure_model" not in vars(module)


def test_modules_that_share_a_callback_keep_to_themselves(trainer):
    """Behaviour 1. One callback, one Trainer after another, two modules."""
    lora, modules = LoRACallback(r=4), [fresh(), fresh(Module, Net(depth=1))]
    for module in modules:
        trainer(lora).fit(module, loader())
    outputs = [output(module) for module in modules]
    run = trainer(lora)
    for module in modules:
        run.test(module, loader(), verbose=False)
    assert all(torch.equal(output(module), before) for module, before in zip(modules, outputs, strict=True))
    assert not any(map(adapted_layers, modules))
    assert all("configure_model" not in vars(module) for module in modules)


# 2. LightningCLI


class Plain(LightningModule):
    """A module as people write it for the CLI: without an optimizer of its own."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width=width)
        self.losses: list[float] = []

    forward, training_step = Module.forward, Module.training_step
    validation_step = test_step = Module.validation_step
    predict_step = Module.predict_step

    def train_dataloader(self):
        return loader()


class WithOptimizer(Plain):
    """With one, as the CLI expects where no ``--optimizer`` is given."""

    configure_optimizers = Module.configure_optimizers


class WithCallable(Plain):
    """With one that the config makes."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW, width: int = 64) -> None:
        super().__init__(width)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


OF_JSONARGPARSE = "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
"""Lightning 2.6 calls it in a way it is about to drop."""


@pytest.mark.filterwarnings(OF_JSONARGPARSE)
@pytest.mark.parametrize(
    ("kind", "words", "optimizer", "rates"),
    [
        (WithOptimizer, [], "FlatPagedAdamW8bit", [1e-2, 7e-3]),
        (Plain, ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01"], "FlatPagedAdamW8bit", [1e-2, 1e-2]),
        (Plain, ["--optimizer=torch.optim.SGD", "--optimizer.lr=0.01"], "SGD", [1e-2, 1e-2]),
        (
            Plain,
            [
                "--optimizer=torch.optim.Adam",
                "--optimizer.lr=0.01",
                "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
                "--lr_scheduler.gamma=0.5",
            ],
            "FlatPagedAdamW8bit",
            [1e-2, 5e-3],
        ),
        (
            WithCallable,
            ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.02"],
            "FlatPagedAdamW8bit",
            [2e-2, 2e-2],
        ),
    ],
    ids=["its own", "eager AdamW", "eager SGD", "eager Adam and scheduler", "callable"],
)
def test_the_stock_cli_trains_the_adapters_with_the_optimizer_of_the_config(
    tmp_path, monkeypatch, kind, words, optimizer, rates
):
    """Behaviour 2. The CLI builds ``--optimizer`` over the base's weights, before there are adapters."""
    (tmp_path / "config.yaml").write_text(f"""
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: {__name__}.Look
    - class_path: lightning_lora.LoRACallback
      init_args:
        r: 4
        train: [head]
        targets:
          all-linear: {{}}
          q_proj: {{r: 2}}
    - class_path: {__name__}.Rates
""")
    monkeypatch.setattr("sys.argv", ["run"])  # pytest's arguments are not the CLI's
    cli = LightningCLI(kind, save_config_callback=None, args=["fit", f"--config={tmp_path}/config.yaml", *words])
    look, *_ = [callback for callback in cli.trainer.callbacks if isinstance(callback, Look)]
    traced, *_ = [callback for callback in cli.trainer.callbacks if isinstance(callback, Rates)]
    assert look.layers == ADAPTED
    assert sorted(look.held) == sorted(look.trained)
    assert len(look.held) == 14
    assert look.after["net.blocks.0.q_proj.adapters.default.lora_A"].shape == (2, 64)
    assert [type(each).__name__ for each in look.optimizers] == [optimizer]
    assert [rate for (rate,) in traced.seen[::4]] == pytest.approx(rates)
    assert cli.model.losses[-1] < cli.model.losses[0]


SHORT_NAME = """
import sys
import lightning_lora
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
assert "bitsandbytes" not in sys.modules
class Model(BoringModel):
    configure_optimizers = None
sys.argv = ["run", "fit", "--optimizer=AdamW", "--optimizer.lr=0.01", "--trainer.accelerator=cpu"]
sys.argv += ["--trainer.logger=false", "--trainer.callbacks=lightning_lora.LoRACallback"]
sys.argv += ["--trainer.callbacks.r=2", "--trainer.fast_dev_run=true"]
cli = LightningCLI(Model, save_config_callback=None)
print(type(cli.trainer.optimizers[0]).__name__)
"""


def test_short_names_of_optimizers_still_parse_with_the_package_imported():
    """Behaviour 2. In a process of its own: here bitsandbytes, which has an AdamW too, is imported already."""
    assert python(SHORT_NAME).endswith("FlatPagedAdamW8bit")


def python(code: str) -> str:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# 3. Checkpoints


class SaveAt(Callback):
    """Saves by hand at every moment a user may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Trainer, name: str) -> None:
        for weights_only in (False, True):
            trainer.save_checkpoint(self.folder / f"{name} {weights_only}.ckpt", weights_only=weights_only)

    def on_train_start(self, trainer, *_):
        self.save(trainer, "start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, f"batch {batch_idx}")

    def on_train_end(self, trainer, *_):
        self.save(trainer, "end")

    def on_exception(self, trainer, *_):
        self.save(trainer, "exception")


class Fails(Callback):
    """Stops a run, after so many batches."""

    def __init__(self, error: BaseException, batches: int = 1) -> None:
        self.error, self.batches = error, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            raise self.error


def require_adapters_alone(folder: Path) -> int:
    """Check every checkpoint of a folder, and return how many there are."""
    sizes = {}
    for path in folder.rglob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        keys = checkpoint["state_dict"].keys()
        assert len(adapters(checkpoint["state_dict"])) == 12, path
        assert keys - adapters(checkpoint["state_dict"]).keys() == {"net.head.weight", "net.head.bias"}, path
        entry = checkpoint["lightning_lora"]
        assert (entry["r"], set(entry["targets"]), entry["train"]) == (4, ADAPTED, ["net.head"]), path
        sizes[path] = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint["state_dict"].values())
    assert set(sizes.values()) == {4 * (4 * (4 * 64 + 2 * 192 + 2 * 192) + 65 * 8)}  # r (I + O) per layer, and the head
    return len(sizes)


# Lightning takes a Trainer with OnExceptionCheckpoint to resume, whatever it is given
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_every_checkpoint_that_anything_writes_holds_the_fine_tune_alone(trainer, tmp_path, quantization):
    """Behaviour 3. In full or weights alone, before or after the merge, from a failing run, never empty."""
    lora = {"r": 4, "train": "head", "quantization": quantization}
    savers = [
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=1, save_top_k=-1, save_last=True),
        ModelCheckpoint(tmp_path / "b", save_weights_only=True, monitor="val", save_top_k=2, save_last="link"),
        ModelCheckpoint(tmp_path / "c", save_last=True, every_n_train_steps=1000),  # writes after the merge
    ]
    by_hand = SaveAt(tmp_path / "d")
    run = trainer(by_hand, LoRACallback(**lora), *savers, max_epochs=2)
    run.fit(fresh(), loader(), loader())
    by_hand.save(run, "after")
    assert (tmp_path / "c" / "last.ckpt").exists()
    assert require_adapters_alone(tmp_path) == 9 + 3 + 1 + 2 * (1 + 4 + 1 + 1)

    failing = tmp_path / "failing"
    savers = [ModelCheckpoint(failing / "e", save_on_exception=True), OnExceptionCheckpoint(failing / "f")]
    run = trainer(LoRACallback(**lora), *savers, SaveAt(failing / "g"), Fails(RuntimeError("the power went out"), 2))
    with pytest.raises(RuntimeError, match="power"):
        run.fit(fresh(), loader())
    assert require_adapters_alone(failing) >= 1 + 1 + 2 * (1 + 1 + 1)


def test_checkpoints_written_in_the_background_are_those_of_their_step(trainer, tmp_path):
    """Behaviour 3. ``AsyncCheckpointIO`` writes while training goes on, and while the adapters are merged."""
    seen, saver = {}, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)

    class Steps(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = adapters(state(pl_module))

    run = trainer(Steps(), LoRACallback(r=4), saver, plugins=[AsyncCheckpointIO()], max_epochs=2)
    run.fit(fresh(), loader())
    for step, expected in seen.items():
        assert same(torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"], expected)
    assert same(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], seen[8])


# 4. Resume


class Stateful(DataLoader):
    """A loader that goes on in the middle of an epoch, in the order it had drawn."""

    def __init__(self) -> None:
        plain = loader()
        super().__init__(plain.dataset, batch_size=4)
        self.position, self.order = 0, []

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws a seed for its workers
        return self.batches()

    def batches(self):
        if not self.position:
            self.order = torch.randperm(len(self.dataset)).split(4)
        for indices in self.order[self.position :]:
            self.position = (self.position + 1) % len(self.order)
            yield [tensor[indices] for tensor in self.dataset.tensors]

    def state_dict(self):
        return {"position": self.position, "order": list(self.order)}

    def load_state_dict(self, state):
        self.position, self.order = state["position"], state["order"]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", None])
@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize(
    ("file", "step"),
    [("epoch=0", 8), ("step=11", 11)],
    ids=["epoch boundary", "mid-epoch"],
)
def test_a_resumed_run_is_the_one_that_never_stopped(trainer, tmp_path, optimizer, quantization, file, step):
    """Behaviour 4. Bit for bit, with dropout and shuffling. More kill points are in ``test_resume.py``."""
    lora = {"r": 4, "dropout": 0.2, "quantization": quantization, "optimizer": optimizer}

    def run(module: Module, **fit) -> Look:
        look = Look()
        savers = [
            ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
            ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        ]
        made = trainer(look, LoRACallback(**lora), *savers, max_epochs=3)
        made.fit(module, Stateful(), loader(), **fit)
        return look

    straight, resumed = fresh(), fresh()
    look = run(straight)
    torch.manual_seed(123)  # whatever the new process has drawn so far
    again = run(resumed, ckpt_path=tmp_path / f"{file}.ckpt")
    assert resumed.losses == straight.losses[step:]
    assert same(again.after, look.after)
    assert same(resumed.state_dict(), straight.state_dict())


# 5. Evaluation of a checkpoint


class Outputs(Callback):
    """What the adapted module computes at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(output(pl_module))


def close(found: Any, expected: torch.Tensor) -> bool:
    """Equal up to the order of summation in fp32, in which adapted and merged layers differ."""
    return relative_difference(found[0] if isinstance(found, list) else found, expected) <= 1e-5


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_checkpoint_computes_what_was_trained_before_and_after_the_merge(trainer, tmp_path, quantization):
    """Behaviour 5. Best, implicit best, by path and in a new process: the adapters are added exactly once."""
    seen, module = Outputs(), fresh()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(seen, LoRACallback(r=4, quantization=quantization), saver, max_epochs=2)
    run.fit(module, loader(), loader())
    first, last = seen.seen
    assert relative_difference(first, last) > 0.01
    merged = output(module)
    assert close(merged, last)
    assert close(run.predict(module, loader(), ckpt_path="best"), last)
    with pytest.warns(UserWarning, match="The best model of the previous `fit` call will be used"):
        assert close(run.predict(dataloaders=loader()), last)
    expected = trainer().test(module, loader(), verbose=False)[0]["val"]
    for evaluate in (run.test, run.validate):
        assert evaluate(module, loader(), ckpt_path="best", verbose=False)[0]["val"] == pytest.approx(expected)
    assert torch.equal(output(module), merged)
    new = trainer(LoRACallback(r=4, quantization=quantization), ModelCheckpoint(tmp_path))
    for predictor, model in ((run, module), (new, module), (new, fresh())):
        assert close(predictor.predict(model, loader(), ckpt_path=tmp_path / "epoch=0.ckpt"), first)
    assert not adapted_layers(module)
    assert close(output(module), first)  # as ever, a module keeps the weights it was evaluated with


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_module_is_built_from_its_checkpoint_without_a_trainer(trainer, quantization):
    """Behaviour 5. With its saved hyperparameters and the modules trained along."""
    module, look = fresh(WithOptimizer, 32), Look()
    run = trainer(look, LoRACallback(r=4, train=["head", "norm"], quantization=quantization))
    run.fit(module)
    torch.manual_seed(0)
    loaded = load_from_checkpoint(WithOptimizer, best(run))
    assert loaded.hparams == {"width": 32}
    assert same(loaded.state_dict(), look.after)
    assert torch.equal(output(loaded), look.output)
    assert list(merge(loaded).state_dict()) == list(fresh(WithOptimizer, 32).state_dict())
    assert close(output(loaded), look.output)


def test_a_module_that_does_not_fit_its_checkpoint_is_refused(trainer, tmp_path):
    """Behaviour 5. Other arguments than in training, or a checkpoint of the whole model."""

    class Deep(Plain):
        def __init__(self, depth: int = 2) -> None:
            super().__init__()
            self.net = Net(depth=depth)

    class Deeper(Deep):
        configure_optimizers = Module.configure_optimizers

    run = trainer(LoRACallback(r=4))
    run.fit(fresh(WithOptimizer))
    with pytest.raises(CheckpointError, match=r"net\.blocks\.0\.q_proj \(shape \(64, 64\) there and \(32, 32\) here"):
        load_from_checkpoint(WithOptimizer, best(run), width=32)
    with pytest.raises(CheckpointError, match=r"trains net\.blocks\.1.*which Deeper does not have"):
        load_from_checkpoint(Deeper, best(run), depth=1)
    whole = trainer()
    whole.fit(fresh(WithOptimizer))
    with pytest.raises(CheckpointError, match=r"not written by LoRACallback; .*load_from_checkpoint"):
        load_from_checkpoint(WithOptimizer, best(whole))


# 6. Another fine-tune's checkpoint


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, "r is 4 there and 8 here"),
        ({"alpha": 8}, r"alpha is 32\.0 there and 8\.0 here"),
        ({"scaling": "rslora"}, "scaling is 'standard' there and 'rslora' here"),
        ({"targets": "q_proj"}, r"targets: net\.blocks\.0\.up_proj.*only there, none only here"),
        ({"quantization": None}, "quantization is 'nf4/64 double-quantized' there and 'none' here"),
        ({"train": "head"}, "train: none only there, net.head only here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_fine_tune_is_refused_naming_both(trainer, tmp_path, stage, settings, said):
    """Behaviour 6. Before a weight is loaded."""
    run = trainer(LoRACallback(r=4))
    run.fit(fresh(), loader())
    module = fresh()
    with pytest.raises(CheckpointError, match=said):
        getattr(trainer(LoRACallback(**{"r": 4, **settings})), stage)(module, loader(), ckpt_path=best(run))
    assert not any(tensor.any() for name, tensor in module.state_dict().items() if "lora_B" in name)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_over_another_base_is_refused_naming_both(trainer, stage):
    """Behaviour 6. Of the same shapes: only the values of one weight differ."""
    run, other = trainer(LoRACallback(r=4)), fresh()
    run.fit(fresh(), loader())
    with torch.no_grad():
        other.net.downs[0].weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"trained on base \w{12} and this model is \w{12}, .*in net\.downs\.0"):
        getattr(trainer(LoRACallback(r=4)), stage)(other, loader(), ckpt_path=best(run))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.pop(next(iter(state))), r"lacks net\.blocks\.0\.q_proj\.adapters\.default\.lora_A"),
        (lambda state: state.update(stray=torch.zeros(1)), "has beyond what is trained stray"),
    ],
    ids=["missing", "unknown"],
)
def test_missing_and_unknown_tensors_in_a_checkpoint_are_refused(trainer, tmp_path, spoil, said):
    """Behaviour 6. Strict loading keeps its meaning for what is ours."""
    run = trainer(LoRACallback(r=4))
    run.fit(fresh(), loader())
    checkpoint = torch.load(best(run), weights_only=True)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "spoilt.ckpt")
    with pytest.raises(CheckpointError, match=said):
        trainer(LoRACallback(r=4)).test(fresh(), loader(), ckpt_path=tmp_path / "spoilt.ckpt")


# 7. Merging


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_merged_weight_is_the_formula_over_the_base_that_was_trained_on(trainer, quantization):
    """Behaviour 7. ``W + alpha / r B A`` in float64, ``W`` being bitsandbytes' own dequantized weight."""
    module, look = fresh(), Look()
    dense = fresh().state_dict()
    trainer(look, LoRACallback(r=4, alpha=12, quantization=quantization)).fit(module, loader())
    for name in ADAPTED:
        weight = dense[f"{name}.weight"]
        if quantization is not None:
            functional = bitsandbytes.functional
            weight = functional.dequantize_4bit(
                *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
            )
        lora_a, lora_b = (look.after[f"{name}.adapters.default.lora_{x}"].double() for x in "AB")
        expected = weight.double() + 3 * lora_b @ lora_a
        found = module.state_dict()[f"{name}.weight"].double()
        assert relative_difference(found, expected) <= 1e-6  # one rounding to fp32, and the sums of a rank-4 product
    assert list(module.state_dict()) == list(dense)
    assert close(output(module), look.output)


def test_the_last_checkpoint_holds_the_trained_adapters_though_it_is_written_after_the_merge(trainer, tmp_path):
    """Behaviour 7. ``ModelCheckpoint(save_last=True)`` may write in its own ``on_train_end``, which comes later."""
    look, saver = Look(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1000)
    trainer(look, LoRACallback(r=4), saver).fit(fresh(), loader())
    assert same(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], adapters(look.after))


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_second_fit_goes_on_with_the_same_adapters_over_the_same_base(trainer, quantization):
    """Behaviour 7. Unmerging gives the base back bit for bit; two fits are one longer one."""
    lora = {"r": 4, "quantization": quantization, "optimizer": None}

    class Constant(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    straight, look = fresh(Constant), Look()
    trainer(look, LoRACallback(**lora), max_epochs=2).fit(straight, loader())
    module, first, second = fresh(Constant), Look(), Look()
    trainer(first, LoRACallback(**lora)).fit(module, loader())
    trainer(second, LoRACallback(**lora)).fit(module, loader())
    assert same(second.before, first.after)
    assert same(second.after, look.after)
    assert module.losses == straight.losses


@pytest.mark.parametrize(
    ("error", "ends_in"), [(RuntimeError("the power went out"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_a_run_that_fails_is_not_merged_and_its_module_can_be_fitted_again(trainer, error, ends_in):
    """Behaviour 7. Neither after an exception nor after Ctrl-C, which Lightning ends in ``SystemExit``."""
    module, interrupt = fresh(), signal.getsignal(signal.SIGINT)
    attributes = set(vars(module))
    run = trainer(LoRACallback(r=4), Fails(error, 2))
    try:
        with pytest.raises(ends_in):
            run.fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, interrupt)  # Lightning ignores it from then on
    assert adapted_layers(module).keys() == ADAPTED
    assert set(vars(module)) - attributes <= {"_hparams"}  # Lightning's own
    assert not {"setup_optimizers", "load_model_state_dict"} & vars(run.strategy).keys()
    trainer(LoRACallback(r=4)).fit(module, loader())
    assert not adapted_layers(module)


def test_a_fast_dev_run_is_not_merged(trainer, tmp_path):
    """Behaviour 7. One batch is no training; nothing is written either."""
    module = fresh()
    trainer(LoRACallback(r=4, output_dir=tmp_path / "out"), fast_dev_run=True).fit(module, loader(), loader())
    assert adapted_layers(module).keys() == ADAPTED
    assert not (tmp_path / "out").exists()


# 8. Tuning before a fit


class Tuned(Module):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 1e-3, 4

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(loader().dataset, self.batch_size)

    def val_dataloader(self):
        return loader()


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_search_leaves_fresh_adapters_and_the_fit_after_it_is_as_without(trainer, search, quantization):
    """Behaviour 8. Neither nested nor merged nor trained by the search."""
    lora = {"r": 4, "quantization": quantization}
    module, run = fresh(Tuned), trainer(LoRACallback(**lora), max_epochs=3)
    if search == "lr_find":
        found = Tuner(run).lr_find(module, max_lr=0.1, num_training=20, update_attr=True)
        assert module.lr == found.suggestion() != 1e-3
    else:
        Tuner(run).scale_batch_size(module, steps_per_trial=2, max_trials=3)
        assert module.batch_size == 8
    tried = len(module.losses)
    assert tried >= 6
    assert adapted_layers(module).keys() == ADAPTED
    assert not any(tensor.any() for name, tensor in module.state_dict().items() if "lora_B" in name)
    after = Look()
    trainer(after, LoRACallback(**lora)).fit(module)

    class Found(Tuned):
        def __init__(self):
            super().__init__()
            self.lr, self.batch_size = module.lr, module.batch_size

    plain, look = fresh(Found), Look()
    trainer(look, LoRACallback(**lora)).fit(plain)
    assert module.losses[tried:] == plain.losses
    assert same(after.after, look.after)
    assert not adapted_layers(module)


@pytest.mark.parametrize(
    ("finder", "attribute"),
    [
        (lambda: LearningRateFinder(max_lr=0.1, num_training_steps=20), "lr"),
        (lambda: BatchSizeFinder(steps_per_trial=1, max_trials=3), "batch_size"),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_a_search_by_a_callback_within_the_fit_trains_from_fresh_adapters(trainer, finder, attribute):
    """Behaviour 8. Lightning moves these callbacks to the front; the search is over before the first real step."""
    module, look = fresh(Tuned), Look()
    before = getattr(module, attribute)
    trainer(look, LoRACallback(r=4), finder(), max_epochs=3).fit(module)
    assert getattr(module, attribute) != before
    assert look.layers == ADAPTED
    assert not any(tensor.any() for name, tensor in look.before.items() if "lora_B" in name)
    assert not adapted_layers(module)


# 9. Weight averaging


@pytest.mark.parametrize(
    "averager",
    [lambda: EMAWeightAveraging(decay=0.9, use_buffers=False), lambda: StochasticWeightAveraging(1e-2, 1)],
    ids=["ema", "swa"],
)
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_averages_of_the_adapters_are_saved_resumed_and_merged(trainer, tmp_path, averager, quantization):
    """Behaviour 9. In depth in ``tests/callbacks/test_averaging.py``."""
    lora = {"r": 4, "quantization": quantization}
    straight, resumed = fresh(), fresh()
    for module, path in ((straight, None), (resumed, tmp_path / "epoch=1.ckpt")):
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(LoRACallback(**lora), averager(), saver, max_epochs=3)
        run.fit(module, loader(), ckpt_path=path)
    assert same(resumed.state_dict(), straight.state_dict())
    assert not adapted_layers(resumed)
    with pytest.raises(UnsupportedError, match="Put LoRACallback first"):
        trainer(averager(), LoRACallback(**lora)).fit(fresh(), loader())


def test_averaging_the_codes_of_a_quantized_base_is_refused(trainer):
    """Behaviour 9. They are bytes, not numbers."""
    with pytest.raises(UnsupportedError, match=r"packed codes.*use_buffers=False"):
        trainer(LoRACallback(r=4), EMAWeightAveraging()).fit(fresh(), loader())


# 10. Schedulers

SCHEDULERS = {
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=20),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 12)], milestones=[3]
    ),
    "Chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


class Scheduled(Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def training_step(self, batch, batch_idx):
        self.log("flat", 1.0)  # a plateau whatever is trained
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        groups = [{"params": self.net.blocks.parameters()}, {"params": self.net.downs.parameters(), "lr": 5e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        scheduler = {"scheduler": SCHEDULERS[self.name](optimizer), "interval": "step", "monitor": "flat"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_are_those_of_the_same_run_without_lora(trainer, tmp_path, name):
    """Behaviour 10. With the swap and without, in each group, and after a resume."""

    def traced(*callbacks, epochs: int = 3, **fit) -> list[list[float]]:
        rates = Rates()
        trainer(*callbacks, rates, max_epochs=epochs).fit(fresh(Scheduled, name), loader(), **fit)
        return rates.seen

    expected = traced()
    assert len({tuple(rates) for rates in expected}) > 3
    for optimizer in ("paged_adamw_8bit", None):
        for path, rates in ((None, expected), (tmp_path / f"{optimizer} epoch=0.ckpt", expected[4:])):
            saver = ModelCheckpoint(tmp_path, filename=f"{optimizer} {{epoch}}", save_top_k=-1)
            assert traced(LoRACallback(r=4, optimizer=optimizer), saver, ckpt_path=path) == rates


# 11. Manual optimization, accumulation, clipping, loss scaling


class Manual(Module):
    """Two optimizers stepped by hand, every second batch, with clipped gradients."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.AdamW(self.net.blocks.parameters(), 1e-2)
        second = torch.optim.Adam(self.net.downs.parameters(), 1e-2)
        return [first, second], [lr_scheduler.StepLR(first, 1, 0.5)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            for optimizer in optimizers:
                self.clip_gradients(optimizer, 0.5, "norm")
                norm = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm()
                assert norm <= 0.5 + 1e-5
                optimizer.step()
                optimizer.zero_grad()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", None])
def test_manual_optimization_steps_two_optimizers_with_accumulation_and_clipping(trainer, optimizer):
    """Behaviour 11. Each optimizer has the adapters of the layers it was given."""
    module, look, rates = fresh(Manual), Look(), Rates()
    run = trainer(look, rates, LoRACallback(r=4, optimizer=optimizer), max_epochs=3)
    run.fit(module, loader())
    assert run.global_step == 3 * 2 * 2
    expected = ["FlatPagedAdamW8bit"] * 2 if optimizer else ["AdamW", "Adam"]
    assert [type(each).__name__ for each in look.optimizers] == expected
    assert [len(each.param_groups[0]["params"]) for each in look.optimizers] == [8, 4]
    assert all(not torch.equal(look.after[name], look.before[name]) for name in look.trained)
    assert rates.seen[::4] == [[1e-2, 1e-2], [5e-3, 1e-2], [2.5e-3, 1e-2]]
    assert module.losses[-1] < module.losses[0]


def test_an_optimizer_kept_by_the_module_that_would_step_nothing_is_refused(trainer):
    """Behaviour 11. It was replaced; ``optimizer=None`` keeps it."""

    class Stored(Manual):
        def configure_optimizers(self):
            self.opt1 = torch.optim.AdamW(self.parameters(), 1e-2)
            return self.opt1

        def training_step(self, batch, batch_idx):
            self.opt1.zero_grad()
            self.manual_backward(Module.training_step(self, batch, batch_idx))
            self.opt1.step()

        def on_train_epoch_end(self):
            pass

    with pytest.raises(
        OptimizerError, match=r"self\.opt1 is a torch\.optim\.AdamW.*self\.optimizers\(\).*optimizer=None"
    ):
        trainer(LoRACallback(r=4)).fit(fresh(Stored), loader())
    module, look = fresh(Stored), Look()
    trainer(look, LoRACallback(r=4, optimizer=None)).fit(module, loader())
    assert all(not torch.equal(look.after[name], look.before[name]) for name in look.trained)


def test_accumulated_batches_make_the_step_of_one_large_batch(trainer):
    """Behaviour 11. And the gradient is clipped once it is whole."""

    def run(size: int, accumulate: int) -> dict[str, torch.Tensor]:
        look = Look()
        made = trainer(look, LoRACallback(r=4), accumulate_grad_batches=accumulate, gradient_clip_val=0.1, max_epochs=2)
        made.fit(fresh(), DataLoader(loader().dataset, size))
        assert made.global_step == 4
        return look.after

    large, small = run(16, 1), run(4, 4)
    # AdamW of a gradient near zero, where the order of summation shows, takes a step of up to lr
    assert all(torch.allclose(large[name], small[name], atol=1e-4) for name in large)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_of_adapters_are_clipped(trainer, algorithm):
    """Behaviour 11. By norm over the adapters alone, or by value."""
    seen = []

    class Gradients(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                seen.append(flat.norm() if algorithm == "norm" else flat.abs().max())

    trainer(LoRACallback(r=4), Gradients(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm).fit(
        fresh(), loader()
    )
    assert seen
    assert all(value == pytest.approx(1e-3, rel=1e-3) for value in seen)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", None])
def test_scaled_fp16_gradients_are_unscaled_clipped_and_skipped_where_they_overflow(trainer, optimizer):
    """Behaviour 11. ``16-mixed`` with a loss scaler, whose first scale is too large on purpose."""
    module, look = fresh(Tuned), Look()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    run = trainer(look, LoRACallback(r=4, optimizer=optimizer), plugins=plugin, max_epochs=4, gradient_clip_val=1.0)
    run.fit(module, loader())
    assert scaler.get_scale() < 2.0**20
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in adapters(look.after).values())
    assert module.losses[-1] < module.losses[0]
    assert all(not torch.equal(look.after[name], look.before[name]) for name in look.trained)
    assert close(output(module), look.output)


# 12. Several processes


def test_set_ups_that_would_lose_adapters_or_gradients_are_refused(trainer):
    """Behaviour 12. What DDP and FSDP2 do over two processes is in ``test_processes.py``."""
    spawning = trainer(strategy="ddp_spawn", devices=2)
    with pytest.raises(UnsupportedError, match=r"starts its processes by 'spawn'.*be lost with them"):
        LoRACallback(r=4).setup(spawning, fresh(), "fit")  # the hook, without starting processes
    with pytest.raises(UnsupportedError, match="train on one device, and the Trainer has 2"):
        trainer(strategy="qlora", devices=2)


class Engine(DeepSpeedStrategy):
    """DeepSpeed's strategy, which cannot be made where DeepSpeed is not installed."""

    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (FSDPStrategy, "FSDPStrategy: its flat parameters cannot hold 4-bit codes.*ModelParallelStrategy"),
        (Engine, "Engine: its engine writes the checkpoints.*Use 'ddp', or ModelParallelStrategy"),
    ],
    ids=["FSDP1", "DeepSpeed"],
)
def test_strategies_that_save_or_shard_in_their_own_way_are_refused(trainer, strategy, said):
    """Behaviour 12. Lightning makes them with GPUs only; here they are put in place."""
    run, sharding = trainer(), strategy()
    sharding.accelerator = run.accelerator
    run._accelerator_connector.strategy = sharding
    with pytest.raises(UnsupportedError, match=said):
        LoRACallback(r=4).setup(run, fresh(), "fit")


@pytest.fixture
def one_process_group():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_adapters_are_not_put_on_layers_that_are_sharded_already(trainer, one_process_group):
    """Behaviour 12. Their gradients would not be reduced; adapted first and then sharded they are."""
    from torch.distributed.fsdp import fully_shard

    class Sharded(Module):
        def configure_model(self):
            for layer in (*self.net.downs, self.net):
                fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))

    module = fresh(Sharded)
    with pytest.raises(UnsupportedError, match=r"is sharded already.*before fully_shard"):
        trainer(LoRACallback(r=4)).fit(module, loader())
    assert not adapted_layers(module)


# 13. Precision


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize(
    ("precision", "dtype", "computed"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_each_precision_keeps_its_dtypes_and_the_codes_of_the_base(trainer, precision, dtype, computed, quantization):
    """Behaviour 13. Casts of the whole module leave the packed base as it is, and the adapters in fp32 or better."""
    trained = torch.promote_types(dtype, torch.float32)

    class Casts(Module):
        def training_step(self, batch, batch_idx):
            loss = (self(batch[0]) - batch[1][:, None].to(dtype)).square().mean()
            self.losses.append(loss.item())
            return loss

        def on_after_backward(self):
            self.grads = {p.grad.dtype for p in self.parameters() if p.grad is not None}

    module, look, dtypes = fresh(Casts), Look(), set()
    module.net.downs[0].register_forward_hook(lambda layer, args, result: dtypes.add(result.dtype))
    run = trainer(look, LoRACallback(r=4, quantization=quantization), precision=precision, max_epochs=2)
    run.fit(module, loader())
    assert computed in dtypes
    assert {tensor.dtype for tensor in adapters(look.after).values()} == module.grads == {trained}
    packed = [name for name in look.after if name.endswith((".codes", ".absmax", ".nested_absmax", ".offset"))]
    assert bool(packed) is (quantization == "nf4")
    assert all(torch.equal(look.after[name], look.before[name]) for name in packed)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.losses[-1] < module.losses[0]


# 14. torch.compile


@pytest.mark.filterwarnings("ignore::Warning")  # dynamo's own, about autograd functions and lru_cache
@pytest.mark.parametrize("whole", [True, False], ids=["module", "network"])
def test_a_compiled_model_trains_as_an_uncompiled_one_and_its_names_stay_clean(trainer, tmp_path, whole):
    """Behaviour 14. What is written names layers as if nothing were compiled."""
    expected, plain_look = fresh(), Look()
    trainer(plain_look, LoRACallback(r=4)).fit(expected, loader())
    module, look = fresh(), Look()
    lora = LoRACallback(r=4, output_dir=tmp_path / "out")
    if whole:
        run = trainer(look, lora)
        run.fit(torch.compile(module, backend="eager"), loader())
    else:
        module.net = torch.compile(module.net, backend="eager")
        run = trainer(look, lora)
        run.fit(module, loader())
    assert module.losses == pytest.approx(expected.losses, rel=1e-5)
    assert close(output(module), plain_look.output)
    checkpoint = torch.load(best(run), weights_only=True)
    assert set(checkpoint["lightning_lora"]["targets"]) == ADAPTED
    for file in ("adapter_model.safetensors", "merged/model.safetensors"):
        assert b"_orig_mod" not in (tmp_path / "out" / file).read_bytes()
    assert run.test(module, loader(), ckpt_path="best", verbose=False)


# 15. The smallest Trainers


class Unlogged(Module):
    def validation_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1][:, None]).square().mean()

    test_step = validation_step


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"barebones": True, "enable_progress_bar": None, "enable_model_summary": None, "logger": None}, True),
        ({"enable_checkpointing": False}, True),
        ({"overfit_batches": 2}, True),
        ({"limit_val_batches": 0, "num_sanity_val_steps": 0}, True),
        ({"max_time": {"seconds": 0.2}, "max_epochs": -1}, True),
        ({"max_epochs": 0}, False),
        ({"max_steps": 0}, False),
        ({"limit_train_batches": 0}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_logger_checkpoint_or_step_is_needed(trainer, tmp_path, settings, trained, quantization):
    """Behaviour 15. Merged if something was trained, adapted and untouched if not."""
    module, out = fresh(Unlogged), tmp_path / "out"
    settings = {"enable_checkpointing": None if "barebones" in settings else False, **settings}
    run = trainer(LoRACallback(r=4, quantization=quantization, output_dir=out), **settings)
    run.fit(module, loader(), loader())
    assert bool(module.losses) is (run.global_step > 0) is trained
    assert bool(adapted_layers(module)) is not trained
    assert out.exists() is trained
    assert not list(tmp_path.rglob("*.ckpt"))
    run.test(module, loader(), verbose=False)


# 16. NF4


def test_the_base_is_quantized_once_and_trains_after_the_sanity_check(trainer):
    """Behaviour 16. The head is left alone, gradients arrive after an evaluation, merged weights are finite."""
    gradients = {}

    class Gradients(Callback):
        def on_after_backward(self, trainer, pl_module):
            gradients.update({name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad})

    settings = {"num_sanity_val_steps": 2, "precision": "bf16-mixed"}
    module, run = fresh(), trainer(LoRACallback(r=4), Gradients(), **settings)
    run.validate(module, loader(), verbose=False)
    layers = adapted_layers(module)
    assert layers.keys() == ADAPTED
    assert type(module.net.head) is nn.Linear
    packed = {name: layer.base_layer for name, layer in layers.items()}
    codes = {name: layer.codes.clone() for name, layer in packed.items()}
    assert all(type(layer) is NF4Linear for layer in packed.values())
    run.fit(module, loader(), loader())
    assert len(gradients) == 12
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(torch.equal(layer.codes, codes[name]) for name, layer in packed.items())
    assert all(p.to(torch.bfloat16).isfinite().all() for p in module.parameters())


# 17. Without bitsandbytes

WITHOUT = """
import sys, importlib.abc
import lightning.pytorch  # its torchmetrics insists on what is installed
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError("No module named 'bitsandbytes' (hidden)", name=name)
sys.meta_path.insert(0, Hidden())
for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
    del sys.modules[name]
import lightning_lora
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
def fit(**settings):
    lora = lightning_lora.LoRACallback(r=2, alpha=2.0, **settings)
    model = BoringModel()
    Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, barebones=True,
            callbacks=[lora]).fit(model)
    return model
assert list(fit(quantization=None).state_dict()) == list(BoringModel().state_dict())
try:
    fit()
except lightning_lora.UnsupportedError as error:
    print(error)
"""


def test_plain_lora_runs_without_bitsandbytes_and_nf4_says_what_to_install():
    """Behaviour 17. More in ``tests/test_public_api.py``."""
    said = python(WITHOUT).splitlines()[-1]
    assert "quantization='nf4' needs bitsandbytes" in said
    assert "pip install" in said


# 18. Conflicts


class Mine(LoRACallback):
    """A user's own."""


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: ([LoRACallback(r=4), LoRACallback(r=4)], {}), RuntimeError, "more than one .* type `LoRACallback`"),
        (lambda: ([LoRACallback(r=4), Mine(r=4)], {}), UnsupportedError, "two LoRACallbacks.*Keep one"),
        (
            lambda: ([LoRACallback(r=4)], {"strategy": LoRAStrategy(r=4)}),
            UnsupportedError,
            "two LoRACallbacks.*LoRA strategy brings one",
        ),
        (
            lambda: ([LoRACallback(r=4), BackboneFinetuning()], {}),
            UnsupportedError,
            "BackboneFinetuning freezes and unfreezes the same parameters.*Drop one",
        ),
        (
            lambda: ([LoRACallback(r=4), ModelPruning("l1_unstructured")], {}),
            UnsupportedError,
            "ModelPruning replaces the weights below the adapters",
        ),
        (lambda: ([LoRACallback("k_proj", r=4)], {}), TargetError, "'k_proj' matches no linear layer.*q_proj"),
        (lambda: ([LoRACallback(exclude="*", r=4)], {}), TargetError, "exclude"),
        (lambda: ([LoRACallback(r=65)], {}), TargetError, "r=65 is more than the full rank 64"),
    ],
    ids=["two", "a subclass too", "a strategy too", "finetuning", "pruning", "no target", "all excluded", "rank"],
)
def test_what_cannot_work_together_is_refused_before_anything_changes(trainer, make, error, said):
    """Behaviour 18. Each message says what to do."""
    module, (callbacks, settings) = fresh(), make()
    before = state(module)
    with pytest.raises(error, match=said):
        trainer(*callbacks, **settings).fit(module, loader())
    assert same(module.state_dict(), before)
    assert all(p.requires_grad for p in module.parameters())


def test_a_precision_that_quantizes_too_is_refused(trainer):
    """Behaviour 18. Lightning lets it be chosen with a GPU only; here it is put in place."""
    run = trainer(LoRACallback(r=4))
    run.strategy._precision_plugin = BitsandbytesPrecision("nf4")
    with pytest.raises(UnsupportedError, match="BitsandbytesPrecision would quantize the base a second time"):
        run.validate(fresh(), loader(), verbose=False)


def test_a_module_that_holds_other_adapters_is_refused(trainer):
    """Behaviour 18. The same ones are taken up, nothing is injected twice."""
    module = fresh()
    quantize(inject(module, config=LoRAConfig(r=4)))
    with pytest.raises(AdapterError, match=r"holds adapters already.*r is 8 there and 4 here"):
        trainer(LoRACallback(r=8)).fit(module, loader())
    trainer(LoRACallback(r=4, merge=False)).fit(module, loader())
    assert adapted_layers(module).keys() == ADAPTED


# 19. Copies


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_module_and_callback_can_be_copied_before_within_and_after_a_run(trainer, clone, quantization):
    """Behaviour 19. A copy of the module computes the same; a copy of the callback runs the same."""
    copies, hooks = {}, ["setup", "on_fit_start", "on_train_batch_end", "on_train_end", "on_fit_end", "teardown"]

    class Copies(Callback):
        def take(self, moment, pl_module):
            copies[moment] = (clone(pl_module), clone(lora), output(pl_module))

    for hook in hooks:
        setattr(Copies, hook, lambda self, trainer, pl_module, *_, hook=hook, **__: self.take(hook, pl_module))
    lora = LoRACallback(r=4, quantization=quantization, dropout=0.1)
    module = fresh()
    copies["before"] = (clone(module), clone(lora), output(module))
    trainer(lora, Copies(), max_epochs=1).fit(module, loader())
    copies["after"] = (clone(module), clone(lora), output(module))
    torch.manual_seed(1)
    assert copies.keys() == {"before", *hooks, "after"}
    for moment, (twin, callback, expected) in copies.items():
        assert torch.equal(output(twin), expected), moment
        assert callback.settings == lora.settings
        twin.requires_grad_(True)
        trainer(callback).fit(merge(twin) if adapted_layers(twin) else twin, loader())
        assert not adapted_layers(twin), moment
    assert torch.equal(output(module), copies["after"][2])


# 20. Progress and summaries


def test_progress_and_summaries_look_as_ever_and_the_totals_are_true(trainer, capsys, caplog):
    """Behaviour 20. A 4-bit weight counts as the weight it stands for, which Lightning's own summary cannot know."""
    dense = sum(p.numel() for p in fresh().parameters())
    trained = 4 * (2 * (64 + 64) + 2 * (64 + 128) + 2 * (128 + 64))
    module = fresh()
    # The level of Lightning's own logger is the process's, and another test may have turned it down.
    with caplog.at_level("INFO"), caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer(
            LoRACallback(r=4),
            RichProgressBar(),
            RichModelSummary(max_depth=2),
            enable_progress_bar=True,
            enable_model_summary=True,
        ).fit(module, loader(), loader())
        trainer(LoRACallback(r=4), ModelSummary(), enable_model_summary=True).fit(fresh(), loader())
    assert f"training {trained:,} of {dense + trained:,} parameters" in caplog.text
    shown = capsys.readouterr().out
    assert "Epoch 0/0" in shown
    assert "net.blocks" in shown
    assert "Trainable params: 4.1 K" in shown
    assert "4.1 K     Trainable params" in caplog.text


def test_loggers_and_monitors_see_the_run(trainer, tmp_path):
    """Behaviour 20. Learning rates are of the optimizer that steps, and a run stopped early ends as any other."""
    logger, rates = CSVLogger(tmp_path), LearningRateMonitor("epoch")
    stop, module = EarlyStopping("val", patience=1, mode="max"), fresh()
    run = trainer(LoRACallback(r=4), rates, stop, logger=logger, max_epochs=5, log_every_n_steps=1)
    run.fit(module, loader(), loader())
    assert stop.stopped_epoch == 1
    assert not adapted_layers(module)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr-FlatPagedAdamW8bit"]) for row in rows if row["lr-FlatPagedAdamW8bit"]] == pytest.approx(
        [1e-2, 7e-3]
    )
    assert len([row for row in rows if row["val"]]) == 2
