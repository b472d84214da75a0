"""Adapters that start in the base weight, through a real Trainer: they train, resume and are refused where unfit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    AdapterError,
    CheckpointError,
    LoRACallback,
    LoRAConfig,
    QuantizationError,
    initialize_eva,
    inject,
    load_from_checkpoint,
    quantize,
)
from lightning_lora.model.layers import adapted_layers
from tests.callbacks.test_lora import TOKENS, Watch
from tests.conftest import relative_difference
from tests.runs import Module, loader

DENSE = [("pissa", None), ("pissa_niter_4", None), ("olora", None)]
CASES = [*DENSE, ("pissa", "nf4"), ("olora", "nf4"), ("loftq", "nf4")]


@pytest.fixture
def run(trainer, tmp_path):
    """Fit for some epochs from the same weights, and give the module and what was seen of it."""

    def fit(epochs, module=None, ckpt_path=None, precision="32-true", **lora) -> tuple[Module, Watch]:
        if module is None:
            torch.manual_seed(0)
            module = Module()
        watch = Watch()
        torch.manual_seed(1 if ckpt_path is None else 123)  # whatever a new process has drawn so far
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}")
        trainer(watch, LoRACallback(**{"r": 4, **lora}), saver, max_epochs=epochs, precision=precision).fit(
            module, loader(shuffle=True), ckpt_path=ckpt_path
        )
        return module, watch

    return fit


@pytest.mark.parametrize(("init", "quantization"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path, init, quantization):
    settings = {"init": init, "quantization": quantization, "dropout": 0.1}
    straight, straight_watch = run(4, **settings)
    assert straight.losses[-1] < straight.losses[0]
    run(2, **settings)
    resumed, resumed_watch = run(4, ckpt_path=tmp_path / "2.ckpt", **settings)
    assert resumed.losses == straight.losses[8:]
    assert all(torch.equal(resumed_watch.state[key], tensor) for key, tensor in straight_watch.state.items())
    assert all(torch.equal(straight_watch.after[name], tensor) for name, tensor in straight_watch.base.items())


@pytest.mark.parametrize(("init", "quantization"), CASES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_is_loaded_without_a_trainer_and_without_decomposing_again(
    run, tmp_path, init, quantization, precision, monkeypatch
):
    _, watch = run(1, init=init, quantization=quantization, precision=precision)
    monkeypatch.setattr(torch.linalg, "svd", None)  # whatever this process would compute, it is the saved start
    monkeypatch.setattr(torch.linalg, "qr", None)
    torch.manual_seed(0)
    loaded = load_from_checkpoint(Module, tmp_path / "1.ckpt")
    state = loaded.state_dict()
    assert set(state) == set(watch.state)
    assert all(torch.equal(state[key].to(t.dtype), t) for key, t in watch.state.items())
    if precision == "32-true":
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), watch.logits)


def test_a_base_quantized_around_another_start_is_refused_and_the_remedy_works(run, tmp_path, monkeypatch):
    """As on another device: the decomposition differs in its last bits."""
    settings = {"init": "pissa", "quantization": "nf4"}
    straight, _ = run(4, **settings)
    run(2, **settings)
    with monkeypatch.context() as other:
        svd = torch.linalg.svd
        other.setattr(torch.linalg, "svd", lambda *a, **k: [part * (1 + 2**-20) for part in svd(*a, **k)])
        with pytest.raises(CheckpointError, match=r"quantized without its starting values.*load_from_checkpoint"):
            run(4, ckpt_path=tmp_path / "2.ckpt", **settings)
        torch.manual_seed(0)
        module = load_from_checkpoint(Module, tmp_path / "2.ckpt").train()
        resumed, _ = run(4, module, ckpt_path=tmp_path / "2.ckpt", **settings)
    assert resumed.losses == straight.losses[8:]


@pytest.mark.parametrize(("there", "here"), [("pissa", "kaiming"), ("kaiming", "pissa"), ("pissa", "loftq")])
def test_a_checkpoint_of_another_start_is_refused_naming_both(run, tmp_path, there, here):
    run(1, init=there)
    names = ["chance" if init == "kaiming" else init for init in (there, here)]
    with pytest.raises(CheckpointError, match=f"start is '{names[0]}' there and '{names[1]}' here"):
        run(2, ckpt_path=tmp_path / "1.ckpt", init=here)


def test_the_merged_module_computes_the_trained_function_and_goes_on(run, trainer):
    module, watch = run(1, init="pissa")
    with torch.no_grad():
        assert relative_difference(module.eval()(TOKENS), watch.logits) <= 1e-5
    again, _ = run(2, module.train(), init="pissa")
    assert again is module


def test_the_folder_at_the_end_is_that_of_the_original_base(run, trainer, tmp_path):
    module, _ = run(1, init="pissa", quantization=None, output_dir=tmp_path / "out")
    torch.manual_seed(0)
    fresh = Module()
    trainer(LoRACallback(adapter=tmp_path / "out", quantization=None), max_epochs=0).fit(fresh, loader())
    with torch.no_grad():
        assert relative_difference(fresh.eval()(TOKENS), module.eval()(TOKENS)) <= 1e-5


def test_loftq_without_quantization_is_refused_by_name():
    with pytest.raises(ValueError, match="init='loftq' fits the adapters to a base that is being quantized"):
        LoRACallback(init="loftq", quantization=None)
    with pytest.raises(ValueError, match="init='loftq'"):
        LoRACallback({"q_proj": LoRAConfig(init="loftq")}, quantization=None)


def test_loftq_under_a_layer_that_stays_dense_is_refused_before_anything_changes(module, trainer):
    module.net.embed = torch.nn.Embedding(16, 64)
    lora = LoRACallback({"all-linear": LoRAConfig(r=4, init="loftq"), "head": LoRAConfig(r=4)})
    trainer(lora, max_epochs=0).fit(module, loader())
    odd = Module()
    odd.net.downs[0] = torch.nn.Linear(127, 64)
    odd.net.blocks[0]["up_proj"] = torch.nn.Linear(64, 127)
    with pytest.raises(QuantizationError, match=r"cannot be done for net\.downs\.0 \(in_features=127 is odd"):
        trainer(LoRACallback(r=4, init="loftq")).fit(odd, loader())
    assert not adapted_layers(odd)


def with_eva(r: int = 4, quantized: bool = True) -> Module:
    torch.manual_seed(0)
    module = Module()
    inject(module, config=LoRAConfig(r=r, init="eva"))
    initialize_eva(module, loader(), forward=lambda model, batch: model(batch[0]))
    return quantize(module) if quantized else module


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_module_started_from_data_is_trained_and_resumed(run, tmp_path, quantization):
    settings = {"init": "eva", "quantization": quantization}
    straight, watch = run(4, with_eva(quantized=quantization is not None), **settings)
    ranks = {watch.state[key].shape[0] for key in watch.state if key.endswith("lora_A")}
    assert len(ranks) > 1
    run(2, with_eva(quantized=quantization is not None), **settings)
    torch.manual_seed(0)
    module = load_from_checkpoint(Module, tmp_path / "2.ckpt").train()
    resumed, _ = run(4, module, ckpt_path=tmp_path / "2.ckpt", **settings)
    assert resumed.losses == straight.losses[8:]


def test_a_module_injected_but_not_started_from_data_is_refused_with_the_way_to_do_it(run, module):
    inject(module, config=LoRAConfig(r=4, init="eva"))
    with pytest.raises(AdapterError, match=r"call initialize_eva\(model, batches\) first"):
        run(1, quantize(module), init="eva")
