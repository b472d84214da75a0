"""``LoRACallback(init="eva")``: a fit starts its adapters from its own batches, and nothing else of the run changes."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_lora import (
    CheckpointError,
    LoRACallback,
    UnsupportedError,
    load_adapter,
    load_from_checkpoint,
)
from lightning_lora.callbacks.rng import random_state
from lightning_lora.model.eva import share
from lightning_lora.model.layers import adapted_layers
from tests.callbacks.test_lora import TOKENS
from tests.conftest import relative_difference
from tests.runs import Module, loader


def same_module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


class Start(Callback):
    """Looks at the adapters before the first step, and at what is trained on."""

    def on_train_start(self, trainer, pl_module):
        hosts = adapted_layers(pl_module)
        self.A = {path: layer.adapter("default").lora_A.detach().clone() for path, layer in hosts.items()}
        self.zero = all(not layer.adapter("default").lora_B.any() for layer in hosts.values())
        self.bases = {type(layer.base_layer).__name__ for layer in hosts.values()}
        self.random = random_state()
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch[0].clone())


@pytest.fixture
def fit(trainer, tmp_path):
    """Fit a module from the same weights and the same random state, and give it and what was seen of its start."""

    def run(module=None, data=None, ckpt_path=None, callbacks=(), settings=None, datamodule=None, **lora):
        module = same_module() if module is None else module
        start = Start()
        torch.manual_seed(1 if ckpt_path is None else 123)
        np.random.seed(1)
        random.seed(1)
        data = loader(shuffle=True) if data is None and datamodule is None else data
        made = trainer(start, LoRACallback(**{"r": 4, "init": "eva", **lora}), *callbacks, **(settings or {}))
        made.fit(module, data, datamodule=datamodule, ckpt_path=ckpt_path)
        return module, start

    return run


def inputs_of(module: nn.Module, paths, batches) -> dict[str, torch.Tensor]:
    """What reaches each layer of the base model in all batches, in ``float64``."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def reference(module: nn.Module, paths, batches, r: int = 4) -> dict[str, torch.Tensor]:
    """The first right singular vectors of all inputs at once, with ranks by the share of variance they explain."""
    vectors, shares = {}, {}
    for path, rows in inputs_of(module, paths, batches).items():
        centered = rows - rows.mean(0)
        _, S, vectors[path] = torch.linalg.svd(centered, full_matrices=False)
        shares[path] = (S.square() / S.square().sum())[: 2 * r].tolist()
    ranks = share(shares, r * len(shares))
    return {path: vectors[path][: ranks[path]] for path in vectors}


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_start_is_the_svd_of_all_inputs_of_the_dense_base(fit, quantization, precision):
    """Within what ``float32`` and forgetting all but ten spare components leave, over 4 batches of 48 tokens."""
    module, start = fit(
        data=loader(), quantization=quantization, eva_batches=4, settings={"precision": precision, "max_epochs": 1}
    )
    expected = reference(same_module(), start.A, [batch[0] for batch in loader()])
    assert {path: A.shape for path, A in start.A.items()} == {path: V.shape for path, V in expected.items()}
    assert len({A.shape[0] for A in start.A.values()}) > 1
    for path, V in expected.items():  # the spaces they span: signs and close neighbours are free
        cosines = torch.linalg.svdvals(start.A[path].double() @ V.T)
        assert cosines.min() > 0.98, (path, cosines)
    assert start.zero
    assert start.bases == ({"NF4Linear"} if quantization else {"Linear"})
    assert module.losses[-1] < module.losses[0]


def same_random(one: dict, other: dict) -> bool:
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"] == other["python"]
        and torch.equal(one["numpy"][1], other["numpy"][1])
    )


def shuffled_by_generator() -> DataLoader:
    return DataLoader(loader().dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7))


class Noisy(TensorDataset):
    """Items changed at random, by all three generators."""

    def __getitem__(self, index):
        tokens, y = super().__getitem__(index)
        return (tokens + int(torch.randint(2, ())) + random.randrange(2) + np.random.randint(2)) % 16, y


class Stream(IterableDataset):
    """Remembers where it is."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        items = loader().dataset
        while self.position < len(items):
            self.position += 1
            yield items[self.position - 1]
        self.position = 0


LOADERS = {
    "shuffled": lambda: loader(shuffle=True),
    "own generator": shuffled_by_generator,
    "augmented": lambda: DataLoader(Noisy(*loader().dataset.tensors), batch_size=8, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
    "persistent workers": lambda: DataLoader(
        loader().dataset, batch_size=8, shuffle=True, num_workers=1, persistent_workers=True
    ),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", LOADERS)
def test_the_run_has_the_batches_and_the_random_state_it_has_with_any_start(fit, name):
    _, plain = fit(data=LOADERS[name](), init="kaiming", quantization=None)
    _, start = fit(data=LOADERS[name](), quantization=None, eva_batches=2)  # and not to the end of the epoch
    assert len(start.batches) == 8
    assert all(torch.equal(one, other) for one, other in zip(start.batches, plain.batches, strict=True))
    assert same_random(start.random, plain.random)


class Busy(Module):
    """Counts, logs, keeps, normalizes and drops out in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.modes: list[bool] = []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.modes.append(self.training)
        assert batch[0].data_ptr()
        y = self.drop(self.norm(self(batch[0])))
        loss = y.square().mean()
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"other": loss})
        if self.logger is not None:
            self.logger.log_metrics({"by hand": 1.0}, step=int(self.steps))
        self.losses.append(loss.item())
        return loss


def test_what_a_step_counts_logs_and_keeps_is_that_of_the_steps_that_trained(fit, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)

    class Untouched(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.seen = {
                "norm": pl_module.norm.running_mean.clone(),
                "steps": pl_module.steps.clone(),
                "kept": list(pl_module.losses),
                "logger": trainer.logger,
                "metrics": dict(trainer.callback_metrics),
            }

    look = Untouched()
    module, _ = fit(
        same_module(Busy),
        callbacks=[look],
        train="norm",
        settings={"logger": logger, "log_every_n_steps": 1, "max_epochs": 1},
    )
    assert not look.seen["norm"].any()
    assert not look.seen["steps"]
    assert look.seen["kept"] == []
    assert look.seen["metrics"] == {}
    assert look.seen["logger"] is logger
    assert module.steps == len(module.losses) == 4
    assert module.modes == [True] * 4
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert text.count("1.0") == 4


def test_batches_go_through_the_hooks_of_the_datamodule(fit):
    class Data(LightningDataModule):
        asked = 0
        moved = 0

        def train_dataloader(self):
            self.asked += 1
            return loader(shuffle=True)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.moved += 1
            return batch[0] // 2, batch[1]

    data = Data()
    _, start = fit(datamodule=data, eva_batches=4, quantization=None, settings={"max_epochs": 1})
    assert data.asked == 2
    assert data.moved <= 8
    expected = reference(same_module(), start.A, [batch[0] // 2 for batch in loader()])
    assert {path: A.shape for path, A in start.A.items()} == {path: V.shape for path, V in expected.items()}
    assert all(torch.linalg.svdvals(start.A[path].double() @ V.T).min() > 0.98 for path, V in expected.items())


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_resumed_run_is_the_uninterrupted_one_and_reads_no_data_for_its_start(
    fit, tmp_path, quantization, monkeypatch
):
    def saver(name: str):
        return ModelCheckpoint(tmp_path, filename=name)

    lora = {"quantization": quantization, "dropout": 0.1}
    straight, _ = fit(callbacks=[saver("4")], settings={"max_epochs": 4}, **lora)
    fit(callbacks=[saver("2")], settings={"max_epochs": 2}, **lora)
    monkeypatch.setattr("lightning_lora.callbacks.from_data.draw", None)
    resumed, _ = fit(ckpt_path=tmp_path / "2.ckpt", settings={"max_epochs": 4}, callbacks=[saver("4b")], **lora)
    assert resumed.losses == straight.losses[8:]
    one, other = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("4", "4b"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_its_checkpoint_is_loaded_and_tested_elsewhere_and_its_folder_fits_the_base(fit, trainer, tmp_path):
    module, _ = fit(
        callbacks=[ModelCheckpoint(tmp_path, filename="end")], quantization=None, output_dir=tmp_path / "out"
    )
    module.eval()
    torch.manual_seed(0)  # of the base, which the module brings
    with torch.no_grad():
        merged = module(TOKENS)
        loaded = load_from_checkpoint(Module, tmp_path / "end.ckpt")
        folder = same_module().eval()
        load_adapter(folder.net, tmp_path / "out")
        assert relative_difference(loaded(TOKENS), merged) <= 1e-5  # merged in another order of summation
        assert relative_difference(folder(TOKENS), merged) <= 1e-5
    (result,) = trainer(
        LoRACallback(r=4, init="eva", quantization=None), ModelCheckpoint(tmp_path, filename="end")
    ).test(same_module(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    (expected,) = trainer().test(module, loader(), verbose=False)
    assert result["val"] == pytest.approx(expected["val"], rel=1e-5)


def test_a_checkpoint_of_another_number_of_ranks_or_another_start_is_refused(fit, tmp_path):
    fit(callbacks=[ModelCheckpoint(tmp_path, filename="eva")], settings={"max_epochs": 1})
    with pytest.raises(CheckpointError, match="24 ranks to share there and has 48 here"):
        fit(ckpt_path=tmp_path / "eva.ckpt", r=8, alpha=64)
    with pytest.raises(CheckpointError, match="start is 'eva' there and 'chance' here"):
        fit(ckpt_path=tmp_path / "eva.ckpt", init="kaiming")
    fit(callbacks=[ModelCheckpoint(tmp_path, filename="kaiming")], init="kaiming", settings={"max_epochs": 1})
    with pytest.raises(CheckpointError, match="start is 'chance' there and 'eva' here"):
        fit(ckpt_path=tmp_path / "kaiming.ckpt")


def test_a_second_fit_goes_on_with_the_adapters_and_reads_no_data(fit, monkeypatch):
    module, first = fit()
    monkeypatch.setattr("lightning_lora.callbacks.from_data.draw", None)
    _, second = fit(module)
    assert {path: A.shape for path, A in first.A.items()} == {path: A.shape for path, A in second.A.items()}
    assert not second.zero


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True, "max_epochs": 1}, {"max_epochs": 0}])
def test_short_and_bare_runs_start_too(fit, settings, tmp_path):
    if "barebones" in settings:
        settings = settings | {"logger": None, "enable_progress_bar": None, "enable_model_summary": None}
    module, _ = fit(settings=settings)
    hosts = adapted_layers(module)
    assert all(layer.adapter("default").started for layer in hosts.values())


def test_the_learning_rate_finder_searches_with_one_start(fit, monkeypatch):
    from lightning_lora.callbacks import from_data

    drawn = []
    real = from_data.draw
    monkeypatch.setattr(from_data, "draw", lambda *a, **k: drawn.append(a) or real(*a, **k))

    class Rated(Module):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(same_module(Rated), callbacks=[finder], settings={"enable_checkpointing": True, "max_epochs": 1})
    assert len(drawn) == 1


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self(batch[0]).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class WithStep(ByHand):
    def eva_step(self, batch):
        return self(batch[0])


def test_a_module_that_optimizes_by_hand_says_how_it_is_called(fit):
    with pytest.raises(UnsupportedError, match=r"ByHand optimizes by hand.*eva_step\(self, batch\)"):
        fit(same_module(ByHand))
    module, start = fit(same_module(WithStep))
    assert len(module.losses) == 8
    assert len({A.shape[0] for A in start.A.values()}) > 1


def test_a_step_that_reads_its_learning_rate_is_told_what_to_do(fit):
    class Rated(Module):
        def training_step(self, batch, _):
            loss = self(batch[0]).square().mean()
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            return loss

    module = same_module(Rated)
    with pytest.raises(UnsupportedError, match=r"Rated failed: IndexError.*eva_step\(self, batch\)"):
        fit(module)
    assert not adapted_layers(module)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_a_fit_or_a_checkpoint_there_is_nothing_to_start_from(trainer, stage):
    module = same_module()
    with pytest.raises(UnsupportedError, match=r"init='eva' starts adapters from training batches.*ckpt_path="):
        getattr(trainer(LoRACallback(r=4, init="eva")), stage)(module, loader())
    assert not adapted_layers(module)


def test_averages_are_refused(fit):
    with pytest.raises(UnsupportedError, match="EMAWeightAveraging copies the module before there is a batch"):
        fit(callbacks=[EMAWeightAveraging(use_buffers=False)])


class OneShot:
    def __iter__(self):
        return self

    def __next__(self):
        return next(iter(loader()))


def test_a_loader_that_gives_each_batch_once_is_refused_unread(fit):
    module = same_module()
    with pytest.raises(UnsupportedError, match="OneShot that gives each batch once"):
        fit(module, data=OneShot(), settings={"limit_train_batches": 2})
    assert not adapted_layers(module)


def test_after_too_few_inputs_the_module_is_as_it_was_and_can_be_fitted(fit):
    module = same_module()
    before = {name: (p, p.requires_grad) for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match="too few inputs have reached"):
        fit(module, data=loader(count=1))
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and p.requires_grad == mode for name, (p, mode) in before.items())
    fit(module)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eva_batches": 4}, "eva_batches=4 is for init='eva'"),
        ({"eva_batches": 0, "init": "eva"}, "eva_batches must be at least 1, got 0"),
    ],
)
def test_a_number_of_batches_that_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LoRACallback(**settings)


def test_a_compiled_module_starts_from_what_reaches_its_layers(fit):
    """A step compiled for the module would run past the layers of the copy, and none would see an input."""
    compiled = torch.compile(same_module(), backend="eager")
    starts = []
    for module in (compiled, same_module()):
        fit(module, settings={"max_epochs": 0})
        hosts = adapted_layers(getattr(module, "_orig_mod", module))
        starts.append({path: layer.adapter("default").lora_A for path, layer in hosts.items()})
    assert all(torch.equal(starts[0][path], A) for path, A in starts[1].items())
