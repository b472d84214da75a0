"""A run is planned to a budget: the least loss that fits, nothing that was set overridden, and an honest refusal."""

import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import BudgetError, LoRACallback, LoRAStrategy, NF2Config, NF3Config, NF4Config, UnsupportedError
from lightning_lora.callbacks.finetune import FINETUNES
from lightning_lora.estimation.estimate import estimate
from lightning_lora.estimation.plan import choose, ladder
from lightning_lora.estimation.setup import BLOCKS, Setup
from lightning_lora.model.layers import adapted_layers
from tests.estimation.allocations import of_record, recording
from tests.estimation.test_estimate import Language


def wide() -> Language:
    """Most of a step is weights: every rung takes less than the one before."""
    return Language(192, 4, 200)


TOKENS = torch.zeros(4, 16, dtype=torch.long)


class Module(LightningModule):
    """As people write them: it logs, keeps numbers, and asks the Trainer."""

    def __init__(self, net: nn.Module | None = None) -> None:
        seed_everything(0, verbose=False)
        super().__init__()
        self.net = net or wide()
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0])
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        assert self.trainer.training or not self.trainer.sanity_checking
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batch_size=4, count=8) -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randint(200, (count, 16), generator=draw)), batch_size, shuffle=True)


RUNGS = [(None, None), (None, BLOCKS), (NF4Config(), None), (NF4Config(), BLOCKS)]


def rung(quantization, checkpointing, net=wide, **values) -> int:
    setup = Setup(
        method="lora", r=4, quantization=quantization, activation_checkpointing=checkpointing, precision="32-true",
        device="cpu", **values,
    )  # fmt: skip
    return estimate(net(), TOKENS, setup).total


def words(size: float) -> str:
    return f"{size / 1e3:.3f}KB"


class Measured(Callback):
    """What the training of a run takes, from its first batch to its last, and what was there before."""

    def on_train_start(self, trainer, pl_module):
        self.before = sum(t.nbytes for t in [*pl_module.parameters(), *pl_module.buffers()])
        self.profile = recording().__enter__()

    def on_train_end(self, trainer, pl_module):
        self.profile.__exit__(None, None, None)
        self.peak = self.before + of_record(self.profile).peak


@pytest.mark.parametrize("index", range(4))
def test_the_first_rung_that_fits_is_chosen_and_the_run_keeps_to_it(trainer, index, caplog):
    sizes = [rung(*each) for each in RUNGS]
    assert sizes == sorted(sizes, reverse=True)
    budget, (quantization, checkpointing) = sizes[index] + 1, RUNGS[index]
    lora, measured, module = LoRACallback(r=4, memory=words(budget), merge=False), Measured(), Module()
    run = trainer(measured, lora, max_epochs=2)
    with caplog.at_level("INFO"):
        run.fit(module, loader())
    storages = {
        layer.base_layer.storage for layer in adapted_layers(module).values() if hasattr(layer.base_layer, "storage")
    }
    assert storages == ({quantization.storage} if quantization else set())
    assert bool(lora.activation_checkpointing) is (checkpointing is not None)
    assert sizes[index] <= budget
    assert measured.peak <= 1.1 * sizes[index]
    table = next(record.message for record in caplog.records if "memory=" in record.message)
    assert table.count("does not fit") == index
    assert table.count("chosen: the first that fits") == 1


def test_planning_leaves_no_trace_in_the_run(trainer):
    planned, plain = Module(), Module()
    trainer(LoRACallback(r=4, memory="1GB")).fit(planned, loader())
    plain = Module()
    trainer(LoRACallback(r=4, quantization=None)).fit(plain, loader())
    assert planned.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(planned.parameters(), plain.parameters(), strict=True))


def test_what_was_set_is_never_overridden(trainer):
    budget = words(rung(None, BLOCKS) + 1)
    with pytest.raises(BudgetError, match=r"as it is +kept .*does not fit"):
        trainer(LoRACallback(r=4, memory=budget, quantization=None, activation_checkpointing=None)).fit(
            Module(), loader()
        )
    lora = LoRACallback(r=4, memory="1GB", quantization="nf3", activation_checkpointing="net.blocks.[0-1]")
    module = Module()
    trainer(lora, max_epochs=1).fit(module, loader())
    assert lora.settings.quantization == NF3Config()
    assert lora.activation_checkpointing == ("net.blocks.[0-1]",)


def test_fewer_than_four_bits_are_for_adapters_that_are_fitted_to_them():
    plain, fitted = (Setup(method="lora", config=config) for config in configs())
    stored = {
        init: [setup.quantization for setup in ladder(setup, any_storage=True, any_blocks=False)]
        for init, setup in (("kaiming", plain), ("loftq", fitted))
    }
    assert stored == {"kaiming": [None, NF4Config()], "loftq": [NF4Config(), NF3Config(), NF2Config()]}


def configs():
    return [LoRACallback(r=4, init=init).settings.config for init in ("kaiming", "loftq")]


def test_a_loftq_run_goes_down_to_two_bits(trainer):
    few = {"config": configs()[1], "targets": ("*.up_proj",)}  # each is decomposed several times
    sizes = [rung(storage, BLOCKS, **few) for storage in (NF3Config(), NF2Config())]
    lora = LoRACallback("*.up_proj", r=4, init="loftq", memory=words(sum(sizes) / 2))
    trainer(lora, max_epochs=1).fit(Module(), loader())
    assert lora.settings.quantization == NF2Config()


def chatty() -> Language:
    """Much of a step is logits."""
    return Language(32, 2, 4000)


def test_where_nothing_fits_the_refusal_says_what_would_and_it_does(trainer):
    budget = words(0.8 * rung(NF4Config(), BLOCKS, net=chatty))
    module = Module(chatty())
    run = trainer(LoRACallback(r=4, memory=budget), accumulate_grad_batches=2)
    with pytest.raises(BudgetError) as told:
        run.fit(module, loader())
    said = str(told.value)
    assert said.count("does not fit") == 4
    assert "The least is" in said
    assert "chunked_cross_entropy" in said
    assert not adapted_layers(module)
    assert module not in FINETUNES
    found = re.search(r"DataLoader\(batch_size=(\d+)\) with Trainer\(accumulate_grad_batches=(\d+)\)", said)
    piece, steps = map(int, found.groups())
    assert piece * steps == 8  # 4 at a time, 2 accumulated
    fits = trainer(LoRACallback(r=4, memory=budget), accumulate_grad_batches=steps, max_epochs=1)
    fits.fit(Module(chatty()), loader(piece))


def test_not_even_one_input_fits(trainer):
    with pytest.raises(BudgetError, match="Not even one of the 4 inputs of a batch fits"):
        trainer(LoRACallback(r=4, memory="1MB")).fit(Module(chatty()), loader())


@pytest.mark.parametrize("arguments", [{"method": "full", "optimizer": None}, {"method": "full", "optimizer": "badam"}])
def test_methods_without_adapters_may_recompute(trainer, arguments):
    setup = LoRACallback(**arguments).as_setup()
    setup = replace(setup, precision="32-true", device="cpu")
    kept, again = (
        estimate(wide(), TOKENS, replace(setup, activation_checkpointing=which)).total for which in (None, BLOCKS)
    )
    assert again < kept
    lora = LoRACallback(**arguments, memory=words((kept + again) / 2))
    trainer(lora, max_epochs=1).fit(Module(), loader())
    assert len(lora.activation_checkpointing) == 4


def test_a_strategy_takes_a_budget_too(trainer):
    strategy = LoRAStrategy(r=4, memory=words(rung(NF4Config(), None) + 1))
    trainer(strategy=strategy, max_epochs=1).fit(Module(), loader())
    assert strategy.lora.settings.quantization == NF4Config()


def test_a_run_resumes_and_tests_with_the_plan_of_its_checkpoint(trainer, tmp_path):
    budget = words(rung(NF4Config(), None) + 1)
    run, module = trainer(LoRACallback(r=4, memory=budget, merge=False), max_epochs=1), Module()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())  # adapted already: goes on as it is
    resumed = Module()
    trainer(LoRACallback(r=4, memory=budget, merge=False)).fit(resumed, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert {layer.base_layer.storage for layer in adapted_layers(resumed).values()} == {NF4Config().storage}


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0])
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Described(ByHand):
    def memory_step(self, batch):
        return self.net(batch[0])


class Reads(Module):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0][:, : int(batch[0].max())])


def test_a_step_that_cannot_be_made_beforehand_is_refused_with_the_way_out(trainer):
    with pytest.raises(UnsupportedError, match=r"ByHand optimizes by hand. Give it a method memory_step"):
        trainer(LoRACallback(r=4, memory="1GB")).fit(ByHand(), loader())
    with pytest.raises(
        UnsupportedError, match=r"Reads failed: UnsupportedError: .* give the module a method memory_st"
    ):
        trainer(LoRACallback(r=4, memory="1GB")).fit(Reads(), loader())
    trainer(LoRACallback(r=4, memory="1GB"), max_epochs=1).fit(Described(), loader())


def test_what_the_estimate_does_not_count_is_refused(trainer):
    with pytest.raises(UnsupportedError, match="does not count the copy that EMAWeightAveraging keeps"):
        trainer(LoRACallback(r=4, memory="1GB"), EMAWeightAveraging(use_buffers=False)).fit(Module(), loader())
    with pytest.raises(ValueError, match="adapter='folder' brings its own"):
        LoRACallback(memory="1GB", adapter="folder")
    with pytest.raises(ValueError, match="'lots' is no size; write 24GB"):
        LoRACallback(memory="lots")


def test_a_storage_that_no_layer_can_have_is_passed_over():
    """A convolution is adapted and never quantized."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    setups = ladder(Setup(method="lora", r=2, targets="0", precision="32-true"), any_storage=True, any_blocks=False)
    found = choose(
        setups, lambda s: estimate(model, torch.zeros(2, 3, 4, 4), s, step=lambda m, x: m(x).square().mean()), 1
    )
    assert found.chosen is None
    assert len(found.tried) == 1


def test_an_estimate_takes_a_callback_for_its_settings():
    lora = LoRACallback(r=4, quantization="nf3", activation_checkpointing="blocks", train="head")
    setup = Setup(method="qlora-3bit", r=4, activation_checkpointing="blocks", train=("head",))
    assert estimate(wide(), TOKENS, lora).parts == estimate(wide(), TOKENS, setup).parts
    lora = LoRACallback(r=4, embeddings="int8", dequantized_cache="300KB")
    setup = Setup(r=4, embeddings="int8", dequantized_cache=300_000)
    found = estimate(wide(), TOKENS, lora).parts
    assert found == estimate(wide(), TOKENS, setup).parts
    assert found != estimate(wide(), TOKENS, Setup(r=4)).parts


@pytest.mark.parametrize("kept", [{"embeddings": "int8"}, {"dequantized_cache": "300KB"}])
def test_what_wants_a_base_in_few_bits_has_one_where_a_dense_one_would_fit(trainer, kept):
    lora = LoRACallback(r=4, memory="1GB", **kept)
    trainer(lora, max_epochs=1).fit(Module(), loader())
    assert lora.settings.quantization == NF4Config()
