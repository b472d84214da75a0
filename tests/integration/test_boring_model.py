"""Lightning's own BoringModel in every way a Trainer runs a module; as everywhere here, a warning is an error.

BoringModel is one ``Linear(32, 2)``; ``WideBoringModel`` is as plain and wide enough for 4 bits and a larger rank.
"""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    ManualOptimBoringModel,
    RandomDataset,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, LoRAStrategy, inject, load_from_checkpoint, quantize
from lightning_lora.model.layers import adapted_layers
from lightning_lora.quantization.nf4 import NF4Linear
from tests.runs import MakeTrainer, trainers_in


class WideBoringModel(BoringModel):
    """BoringModel with a hidden layer, 64 features wide."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(64, 64))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class ManualWideBoringModel(ManualOptimBoringModel, WideBoringModel):
    """The same, which steps its optimizer by itself."""


class AdamWide(WideBoringModel):
    """With the optimizer that is swapped."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Kind:
    """A model class with the callback's arguments it is run with, and what those have to make of it."""

    def __init__(self, model: type[BoringModel], manual: type[BoringModel], storage: str | None, r: int) -> None:
        self.model, self.manual, self.storage, self.r = model, manual, storage, r

    @property
    def settings(self) -> dict[str, Any]:
        # alpha / r = 1: its SGD of lr=0.1 makes the base's steps, and those of adapters grow with (alpha / r)**2
        return {"r": self.r, "alpha": float(self.r), "quantization": self.storage}

    def lora(self, **settings) -> LoRACallback:
        return LoRACallback(**{**self.settings, **settings})

    def require_adapted(self, module: LightningModule) -> None:
        layers = adapted_layers(module)
        assert layers
        assert all(isinstance(layer.base_layer, NF4Linear) is (self.storage == "nf4") for layer in layers.values())

    def require_merged(self, module: LightningModule) -> None:
        assert list(module.state_dict()) == list(self.model().state_dict())
        assert not adapted_layers(module)


KINDS = {
    "dense": Kind(BoringModel, ManualOptimBoringModel, None, 2),
    "wide nf4": Kind(WideBoringModel, ManualWideBoringModel, "nf4", 4),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request) -> Kind:
    return request.param


@pytest.fixture
def trainer(tmp_path) -> MakeTrainer:
    """Of few, short epochs."""
    return trainers_in(
        tmp_path,
        limit_train_batches=4,
        limit_val_batches=2,
        limit_test_batches=2,
        limit_predict_batches=2,
        log_every_n_steps=1,
    )


def adapters(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if "lora_" in name}


def moved(module: LightningModule) -> bool:
    """Whether training has changed the adapters: ``lora_B`` starts at zero."""
    return all(p.any() for name, p in adapters(module).items() if "lora_B" in name)


def test_fit(kind, trainer):
    module = kind.model()
    run = trainer(kind.lora())
    run.fit(module)
    assert run.global_step == 8
    kind.require_merged(module)


def test_fit_without_merging(kind, trainer):
    module = kind.model()
    trainer(kind.lora(merge=False)).fit(module)
    kind.require_adapted(module)
    assert moved(module)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_a_fit_is_that_of_the_base(kind, trainer, stage):
    module = kind.model()
    base = inject(copy.deepcopy(module), config=LoRAConfig(r=kind.r)).eval()
    if kind.storage is not None:
        quantize(base)
    batch = module.train_dataloader().dataset.data
    arguments = {} if stage == "predict" else {"verbose": False}
    getattr(trainer(kind.lora()), stage)(module, **arguments)
    kind.require_adapted(module)
    assert torch.equal(module.eval()(batch), base(batch))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_after_a_fit(kind, trainer, stage):
    module = kind.model()
    run = trainer(kind.lora())
    run.fit(module)
    arguments = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(module, **arguments)
    getattr(run, stage)(module, ckpt_path="best", **arguments)
    kind.require_merged(module)


def test_fast_dev_run(kind, trainer):
    module = kind.model()
    run = trainer(kind.lora(), fast_dev_run=True)
    run.fit(module)
    run.test(module, verbose=False)
    kind.require_adapted(module)


def test_barebones(kind, tmp_path):
    settings = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2, "default_root_dir": tmp_path}
    module = kind.model()
    Trainer(barebones=True, accelerator="cpu", callbacks=[kind.lora()], **settings).fit(module)
    kind.require_merged(module)


def test_overfit_batches(kind, trainer):
    module = kind.model()
    run = trainer(kind.lora(), overfit_batches=2, max_epochs=2)
    run.fit(module)
    assert run.global_step == 4
    kind.require_merged(module)


@pytest.mark.parametrize("nothing", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_steps": 0}])
def test_nothing_to_train(kind, trainer, nothing):
    module = kind.model()
    trainer(kind.lora(), **nothing).fit(module)
    kind.require_adapted(module)
    assert not moved(module)


def test_a_second_fit(kind, trainer):
    module = kind.model()
    trainer(kind.lora()).fit(module)
    trainer(kind.lora()).fit(module)
    kind.require_merged(module)


def test_resume(kind, trainer):
    torch.manual_seed(0)
    run = trainer(kind.lora())
    run.fit(kind.model())
    torch.manual_seed(0)
    module = kind.model()
    again = trainer(kind.lora(), max_epochs=3)
    again.fit(module, ckpt_path=run.checkpoint_callback.best_model_path)
    assert again.global_step == 12
    kind.require_merged(module)


def test_a_module_from_its_checkpoint(kind, trainer):
    torch.manual_seed(0)
    module = kind.model()
    run = trainer(kind.lora(merge=False))
    run.fit(module)
    torch.manual_seed(0)
    loaded = load_from_checkpoint(kind.model, run.checkpoint_callback.best_model_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in module.state_dict().items())


class WithRate:
    """What the tuner sets."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, self.batch_size)


def test_lr_find(kind, trainer):
    module = type("Tuned", (WithRate, kind.model), {})()
    run = trainer(kind.lora())
    Tuner(run).lr_find(module, num_training=5, update_attr=False)
    kind.require_adapted(module)
    assert not moved(module)
    run.fit(module)
    kind.require_merged(module)


def test_scale_batch_size(kind, trainer):
    module = type("Tuned", (WithRate, kind.model), {})()
    run = trainer(kind.lora())
    Tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    kind.require_adapted(module)
    assert module.batch_size == 4
    assert not moved(module)
    run.fit(module)
    kind.require_merged(module)


@pytest.mark.parametrize(
    "averager",
    [lambda: EMAWeightAveraging(decay=0.9, use_buffers=False), lambda: StochasticWeightAveraging(0.01)],
    ids=["ema", "swa"],
)
def test_weight_averaging(kind, trainer, averager):
    module = kind.model()
    trainer(kind.lora(), averager()).fit(module)
    kind.require_merged(module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precisions(kind, trainer, precision):
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    module = kind.model()
    loader = DataLoader(RandomDataset(module.train_dataloader().dataset.data.shape[1], 8))
    loader.dataset.data = loader.dataset.data.to(dtype)
    run = trainer(kind.lora(), precision=precision)
    run.fit(module, loader, loader)
    kind.require_merged(module)
    assert {p.dtype for p in module.parameters()} == {dtype}
    run.test(module, loader, ckpt_path="best", verbose=False)


@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_accumulation_and_clipping(kind, trainer, clipping):
    module = kind.model()
    run = trainer(kind.lora(), accumulate_grad_batches=2, gradient_clip_val=0.5, gradient_clip_algorithm=clipping)
    run.fit(module)
    assert run.global_step == 4
    kind.require_merged(module)


@pytest.mark.parametrize(
    ("strategy", "storage"),
    [
        (lambda: "lora", None),
        (lambda: "qlora", "nf4"),
        (lambda: LoRAStrategy(r=2, alpha=2.0, quantization=None, merge=False), None),
        (lambda: LoRAStrategy(r=2, alpha=2.0, merge=False), "nf4"),
    ],
)
def test_strategies(trainer, strategy, storage):
    class Square(WideBoringModel):  # wide enough for the strategies' default rank
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))

    module = Square()
    run = trainer(strategy=strategy())
    run.fit(module)
    assert run.global_step == 8
    if run.strategy.lora.merge:
        assert not adapted_layers(module)
    else:
        assert {isinstance(x.base_layer, NF4Linear) for x in adapted_layers(module).values()} == {storage == "nf4"}


def test_manual_optimization(kind, trainer):
    module = kind.manual()
    trainer(kind.lora(merge=False)).fit(module)
    kind.require_adapted(module)
    assert moved(module)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", None])
def test_adamw(trainer, optimizer):
    module = AdamWide()
    trainer(LoRACallback(r=4, optimizer=optimizer, merge=False)).fit(module)
    assert moved(module)


@pytest.mark.parametrize("data", [BoringDataModule, BoringDataModuleNoLen])
def test_data_from_a_datamodule_with_and_without_length(trainer, data):
    module = BoringModel()
    run = trainer(LoRACallback(r=2, alpha=2.0, quantization=None))
    run.fit(module, datamodule=data())
    run.test(module, datamodule=data(), ckpt_path="best", verbose=False)
    assert run.global_step == 8
    assert not adapted_layers(module)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's call of it
def test_the_stock_cli(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run"])  # pytest's arguments are not the CLI's
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "default_root_dir": str(tmp_path),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "lightning_lora.LoRACallback", "init_args": kind.settings}],
    }
    cli = LightningCLI(kind.model, args={"fit": {"trainer": arguments}, "subcommand": "fit"}, seed_everything_default=1)
    kind.require_merged(cli.model)
