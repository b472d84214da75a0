"""``AdapterMonitor`` in real runs: what it logs is what was there, wherever it stands, and the run goes on the same."""

import copy
import csv
import logging
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_lora import AdapterError, AdapterMonitor, LoRACallback, UnsupportedError, merge
from lightning_lora.metrics.updates import dense_update
from lightning_lora.model.layers import adapted_layers
from tests.runs import Module, loader

METHODS = {
    "lora": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "lora_fa": {"lora_B"},  # A is frozen, and has no gradient rather than one of zero
    "vera": {"vera_lambda_d", "vera_lambda_b"},
}


class Notes(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    name = version = "notes"

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def ours(self) -> dict[int, dict[str, float]]:
        found = {step: {k: v for k, v in row.items() if k.startswith("lora/")} for step, row in self.rows.items()}
        return {step: row for step, row in found.items() if row}


class Witness(Callback):
    """Sees for itself, with dense matrices and autograd's own gradients."""

    def __init__(self) -> None:
        self.gradients: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.requires_grad]).norm())

    def on_train_batch_end(self, trainer, pl_module, *_):
        layers = adapted_layers(pl_module).values()
        delta = torch.cat([dense_update(layer).flatten() for layer in layers])
        self.norms.append((delta.norm() / torch.cat([layer.base_weight().flatten() for layer in layers]).norm()).item())


def lora(**settings) -> LoRACallback:
    return LoRACallback(**{"r": 4, "quantization": None, "optimizer": None, **settings})


@pytest.fixture
def run(trainer):
    """Train the toy module, monitored; returns what was logged, the Trainer and the module."""

    def make(*callbacks, kind=Module, data=None, ckpt_path=None, **settings):
        seed_everything(0, verbose=False)
        notes, module = Notes(), kind()
        made = trainer(*callbacks, **{"logger": notes, "enable_checkpointing": False, **settings})
        made.fit(module, data or loader(), ckpt_path=ckpt_path)
        return notes.ours(), made, module

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_it_logs_the_norms_that_dense_matrices_and_autograd_give(run, method, quantization):
    witness = Witness()
    rows, _, _ = run(AdapterMonitor(2), lora(method=method, quantization=quantization), witness)
    assert sorted(rows) == [1, 3, 5, 7]
    for step, row in rows.items():
        parts = {name.rpartition("/")[2]: value for name, value in row.items() if "/grad_norm/" in name}
        assert parts.keys() == METHODS[method]
        # Sums of float32 in another order.
        assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(witness.gradients[step].item(), 1e-5)
        # The dense update is a difference of weights rounded to float32, 1e-7 of them each.
        assert row["lora/update_norm"] == pytest.approx(witness.norms[step], rel=1e-4, abs=1e-7)
        assert ("lora/effective_rank" in row) == (method != "dora")


def test_dora_is_told_to_have_no_ranks(run, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        run(AdapterMonitor(2), lora(method="dora"))
    assert "not of low rank, so effective and stable rank leave them out" in caplog.text


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_its_place_among_the_callbacks_does_not_matter(run, quantization):
    """The last row is logged when training has ended, before the merge or after it."""
    found = []
    for order in (1, -1):
        callbacks = [AdapterMonitor(3), lora(quantization=quantization, optimizer="paged_adamw_8bit")][::order]
        rows, _, _ = run(*callbacks)
        found.append(
            {s: {k: v for k, v in row.items() if "second" not in k and "rss" not in k} for s, row in rows.items()}
        )
    assert sorted(found[0]) == [2, 5, 7]
    assert found[0][7]["lora/update_norm"] > found[0][2]["lora/update_norm"] > 0
    assert found[0] == found[1]


def test_a_run_with_it_is_the_run_without_it(run):
    plain = run(lora(dropout=0.1))[2]
    watched = run(lora(dropout=0.1), AdapterMonitor(1, detail="layers"))[2]
    assert watched.losses == plain.losses
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))


def test_gradients_are_whole_under_accumulation(run):
    """Four batches of 2 make the step of one batch of 8, and one row is logged for it."""
    rows, _, _ = run(AdapterMonitor(1), lora(), max_epochs=1)
    halves = torch.utils.data.DataLoader(loader().dataset, batch_size=2)
    accumulated, _, _ = run(AdapterMonitor(1), lora(), data=halves, max_epochs=1, accumulate_grad_batches=4)
    assert rows.keys() == accumulated.keys() == {0, 1, 2, 3}
    for name in ("lora/grad_norm/lora_A", "lora/grad_norm/lora_B", "lora/update_norm"):
        for step in range(4):
            # A is without gradient at first; after that, sums in another order through AdamW.
            assert accumulated[step][name] == pytest.approx(rows[step][name], rel=1e-3, abs=1e-6)


class Fused(Module):
    """Its optimizer takes scaled gradients and unscales them itself."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, fused=True)


@pytest.mark.parametrize("kind", [Module, Fused])
def test_gradients_are_unscaled_in_half_precision(run, kind):
    """The scaler multiplies by 65536; half precision itself costs about three digits, summed over layers."""
    exact = run(AdapterMonitor(1), lora(), kind=kind, max_steps=1)[0][0]
    half = run(AdapterMonitor(1), lora(), kind=kind, max_steps=1, plugins=MixedPrecision("16-mixed", "cpu"))[0][0]
    assert half["lora/grad_norm/lora_B"] == pytest.approx(exact["lora/grad_norm/lora_B"], rel=2e-2)


def test_gradients_are_looked_at_before_they_are_clipped(run):
    free = run(AdapterMonitor(1), lora(), max_steps=1)[0][0]
    clipped = run(AdapterMonitor(1), lora(), max_steps=1, gradient_clip_val=1e-3)[0][0]
    assert clipped["lora/grad_norm/lora_B"] == free["lora/grad_norm/lora_B"] > 1e-2


class Manual(Module):
    """Two optimizers, of which one steps every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        down = [p for name, p in self.named_parameters() if "lora_A" in name]
        up = [p for name, p in self.named_parameters() if "lora_B" in name]
        return torch.optim.SGD(up, lr=0.1), torch.optim.SGD(down, lr=0.1)


def test_of_several_optimizers_the_ones_that_step_count(run):
    rows, _, _ = run(AdapterMonitor(1), lora(), kind=Manual, max_epochs=1)
    assert {step: sum("grad_norm" in name for name in row) for step, row in rows.items()} == {0: 1, 1: 2, 2: 1, 3: 2}


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Logging(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_it_logs_to_every_logger_at_the_steps_of_the_modules_own_values(run, tmp_path):
    files, notes = CSVLogger(tmp_path, name="csv", version=""), Notes()
    run(AdapterMonitor(4), lora(), kind=Logging, logger=[files, notes], log_every_n_steps=2)
    rows = read(tmp_path / "csv")
    steps = {name: [int(row["step"]) for row in rows if row[name]] for name in ("loss", "lora/update_norm")}
    assert steps == {"loss": [1, 3, 5, 7], "lora/update_norm": [3, 7]}
    assert float(rows[-1]["lora/update_norm"] or rows[-2]["lora/update_norm"]) == notes.ours()[7]["lora/update_norm"]


def test_it_logs_to_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(AdapterMonitor(4), lora(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in seen.Scalars("lora/update_norm")] == [3, 7]


@pytest.mark.parametrize("logger", [False, True], ids=["none", "any"])
def test_callbacks_find_its_values_without_a_logger_too(run, logger, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="lora/update_norm", mode="min", save_top_k=1, filename="{step}")
    settings = {} if logger else {"logger": False}
    _, made, _ = run(AdapterMonitor(4), lora(), saver, enable_checkpointing=True, **settings)
    assert made.callback_metrics["lora/update_norm"] > 0
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=4.ckpt"]


def test_a_resumed_run_goes_on_at_the_same_steps(run, tmp_path):
    straight, _, _ = run(AdapterMonitor(3), lora(merge=False), max_epochs=4)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    settings = {"enable_checkpointing": True, "max_epochs": 4}
    run(AdapterMonitor(3), lora(merge=False), saver, **settings)
    resumed, _, _ = run(
        AdapterMonitor(3), lora(merge=False), copy.deepcopy(saver), ckpt_path=tmp_path / "step=4.ckpt", **settings
    )
    assert sorted(straight) == [2, 5, 8, 11, 14, 15]
    assert sorted(resumed) == [5, 8, 11, 14, 15]
    for step, row in resumed.items():
        assert {k: v for k, v in row.items() if "norm" in k} == {k: v for k, v in straight[step].items() if "norm" in k}


def test_a_model_without_adapters_is_refused_with_what_to_do(run):
    with pytest.raises(AdapterError, match=r"finds no adapters in Module. Add LoRACallback"):
        run(AdapterMonitor())


def test_a_model_merged_by_hand_in_mid_run_is_no_longer_measured(run):
    class Hasty(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                merge(pl_module)
                pl_module.requires_grad_(True)

    with pytest.raises(AdapterError, match="has no adapters, or they are merged"):
        run(AdapterMonitor(2), lora(), Hasty())


def test_a_sharded_model_is_refused(trainer):
    made = trainer(AdapterMonitor(), strategy=ModelParallelStrategy(), devices=1)
    with pytest.raises(UnsupportedError, match="of which each process of a sharded model holds a part"):
        AdapterMonitor().setup(made, Module(), "fit")


class Attending(Module):
    def __init__(self) -> None:
        super().__init__(nn.MultiheadAttention(8, 2, batch_first=True))

    def forward(self, x):
        return self.net(x, x, x, need_weights=False)[0]


def test_projections_of_an_attention_are_layers_of_their_own(run):
    data = torch.utils.data.TensorDataset(torch.randn(8, 5, 8), torch.randn(8, 8))
    made = AdapterMonitor(1, detail="layers", metrics="update")
    rows, _, _ = run(made, lora(), kind=Attending, data=torch.utils.data.DataLoader(data, 4), max_epochs=1)
    names = {f"lora/update_norm/net.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert names == {name for name in rows[1] if name.startswith("lora/update_norm/")}
    assert all(rows[1][name] > 0 for name in names)


def test_memory_is_told_once_and_its_parts_are_the_models(run):
    rows, _, module = run(AdapterMonitor(2), lora(merge=False, train="head"))
    told = {
        step: {k.rpartition("/")[2]: v for k, v in row.items() if "/memory_MiB/" in k} for step, row in rows.items()
    }
    assert [bool(told[step]) for step in sorted(told)] == [True, False, False, False]
    parameters = {name: 4 * p.numel() / 2**20 for name, p in module.named_parameters()}
    adapters = sum(size for name, size in parameters.items() if ".adapters." in name)
    head = sum(size for name, size in parameters.items() if "head" in name and ".adapters." not in name)
    assert told[1]["adapters"] == pytest.approx(adapters)
    assert told[1]["trained"] == pytest.approx(head)
    assert told[1]["base"] == pytest.approx(sum(parameters.values()) - adapters - head)
    assert told[1]["gradients"] == pytest.approx(adapters + head)
    assert told[1]["optimizer"] >= 2 * told[1]["gradients"]
    assert told[1]["activations"] > 0


def test_what_has_no_tokens_says_so_and_logs_none(run, caplog):
    data = torch.utils.data.TensorDataset(torch.randn(8, 5, 8), torch.randn(8, 8))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        rows, _, _ = run(
            AdapterMonitor(1), lora(), kind=Attending, data=torch.utils.data.DataLoader(data, 4), max_epochs=1
        )
    assert "the batch holds no tokens" in caplog.text
    assert not any("tokens" in name for row in rows.values() for name in row)


def test_an_exception_in_a_forward_pass_leaves_no_hook_behind(run):
    class Failing(Module):
        def training_step(self, batch, _):
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        run(AdapterMonitor(1), lora(), kind=Failing)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))])
def test_a_copy_is_set_in_the_same_way_and_in_no_run(duplicate, run):
    monitor = duplicate(AdapterMonitor(4, metrics=["update"], tokens="ids"))
    assert (monitor.every_n_steps, monitor.metrics, monitor.tokens) == (4, ("update",), "ids")
    assert run(monitor, lora())[0].keys() == {3, 7}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"metrics": ["norms"]}, "metrics must be one of update, grad_norm, throughput, memory, got 'norms'"),
        ({"detail": "all"}, "detail must be one of model, layers, got 'all'"),
    ],
)
def test_a_setting_that_is_none_is_refused_when_it_is_made(settings, said):
    with pytest.raises(ValueError, match=said):
        AdapterMonitor(**settings)
