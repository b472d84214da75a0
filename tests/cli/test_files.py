"""``inspect``, ``verify`` and ``convert``: what they print, what they refuse, and that conversions lose nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import (
    DoRAConfig,
    LoRACallback,
    LoRAConfig,
    LoRAFAConfig,
    VeRAConfig,
    export_merged,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.io.inspection import inspect as inspect_file
from tests.callbacks import conftest
from tests.conftest import Net, randomize
from tests.io.files import Bomb
from tests.runs import Module, loader

trainer = conftest.trainer
TOKENS = torch.arange(12)[None] % 16


def seeded() -> Module:
    torch.manual_seed(0)
    return Module()


def adapted(**settings):
    torch.manual_seed(0)
    return randomize(inject(Net(), ["q_proj", "embed"], LoRAConfig(r=2, alpha=3), **settings))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(quantize(adapted(train="head")), tmp_path / "adapter")
    return tmp_path / "adapter"


def inspected(path, capsys) -> dict:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(arguments: list, capsys) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) <= 6
    return said


# ---- inspect


def test_an_adapter_folder_is_described(folder, capsys):
    found = inspected(folder, capsys)
    assert found["what"] == "adapter folder"
    assert (found["method"], found["r"], found["alpha"], found["train"]) == ("lora", 2, 3.0, ["head"])
    assert found["targets"] == ["blocks.0.q_proj", "blocks.1.q_proj", "embed"]
    assert found["quantization"] == {
        "blocks.0.q_proj": "nf4/64 double-quantized",
        "blocks.1.q_proj": "nf4/64 double-quantized",
        "embed": "none",
    }
    assert len(found["base"]) == 12
    assert found["bytes"] == sum(t.numel() * 4 for t in load_file(folder / "adapter_model.safetensors").values())
    assert found["readers"]["vLLM"].startswith("no: modules_to_save;")
    assert "adapters on embeddings" in found["readers"]["llama.cpp (GGUF)"]


def test_norms_are_those_of_the_factors_and_of_their_product(folder, capsys):
    found = {each["name"]: each for each in inspected(folder, capsys)["layers"]}
    for path, each in found.items():
        adapter = adapted(train="head").get_submodule(path).adapter("default")
        product = 1.5 * adapter.lora_B.double() @ adapter.lora_A.double()
        assert each["norm_A"] == pytest.approx(adapter.lora_A.double().norm().item())
        assert each["norm_update"] == pytest.approx(product.norm().item())


def test_tables_name_the_layers_and_who_can_read_it(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    for word in ("adapter folder", "blocks.0.q_proj", "|s B A|", "PEFT, transformers", "vLLM", "llama.cpp"):
        assert word in said


def test_a_checkpoint_and_a_merged_model_are_described(trainer, tmp_path, capsys):
    run = trainer(LoRACallback(r=4, output_dir=tmp_path / "out"), max_epochs=1)
    run.fit(seeded(), loader())
    found = inspected(run.checkpoint_callback.best_model_path, capsys)
    assert (found["what"], found["step"], found["r"]) == ("Lightning checkpoint", 4, 4)
    assert found["base"] == inspected(tmp_path / "out", capsys)["base"]  # the folder's names lack "net."
    merged = inspected(tmp_path / "out" / "merged", capsys)
    assert merged["what"] == "merged model"
    assert merged["parameters"] == sum(p.numel() for p in Net().parameters())
    assert main(["inspect", run.checkpoint_callback.best_model_path]) == 0
    assert main(["inspect", str(tmp_path / "out" / "merged")]) == 0


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_none_of_ours_is_refused(command, tmp_path, capsys):
    assert "no such file" in refused([command, tmp_path / "absent"], capsys)
    assert "is no adapter folder" in refused([command, tmp_path], capsys)
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    assert "was not written by LoRACallback" in refused([command, tmp_path / "x.ckpt"], capsys)
    assert "is a URL" in refused([command, "https://example.org/x.ckpt"], capsys)


OTHERS = {
    "dora": (DoRAConfig(r=2), ["norm_A", "norm_B", "norm_magnitude_vector"]),
    "lora_fa": (LoRAFAConfig(r=2), ["norm_A", "norm_B"]),
    "vera": (VeRAConfig(r=4), ["norm_vera_lambda_d", "norm_vera_lambda_b"]),
}


@pytest.mark.parametrize(("config", "norms"), OTHERS.values(), ids=OTHERS)
def test_other_methods_and_biases_are_described_and_verified(config, norms, tmp_path, capsys):
    model = inject(Net(), ["q_proj", "up_proj"], config, train="head", train_bias="adapted")
    save_adapter(randomize(model), tmp_path)
    found = inspected(tmp_path, capsys)
    assert (found["method"], found["r"]) == (config.method, config.r)
    assert found["biases"] == ["blocks.0.up_proj", "blocks.1.up_proj"]
    assert found["train"] == ["head"]
    for each in found["layers"]:
        adapter = model.get_submodule(each["name"]).adapter("default")
        assert {key for key in each if key.startswith("norm_")} == {*norms, "norm_update"}
        for name, tensor in adapter.named_parameters():
            norm = each[f"norm_{name.removeprefix('lora_')}"]
            assert norm == pytest.approx(tensor.double().norm().item())
        assert (each["norm_update"] is None) == (config.method != "lora_fa")
    assert "bias='" in found["readers"]["vLLM"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path)]) == 0


# ---- verify


def test_a_sound_adapter_is_said_to_be_and_what_was_checked(folder, tmp_path, capsys):
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    assert main(["verify", str(folder), "--base", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert "SHA-256 of every tensor" in said
    assert "base is the one trained on" in said
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    said = refused(["verify", folder, "--base", tmp_path / "base"], capsys)
    assert "another one in blocks.0.q_proj (other values)" in said


def test_a_flipped_bit_is_found(folder, capsys):
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert "SHA-256" in refused(["verify", folder], capsys)


def test_of_a_foreign_file_it_says_what_is_not_checked(folder, capsys):
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    assert main(["verify", str(folder)]) == 0
    assert "not checked: the bytes of the tensors" in capsys.readouterr().out


def test_merged_models_are_verified(tmp_path, capsys):
    model = adapted()
    export_merged(model, tmp_path / "merged", max_shard_size="20KB")
    assert main(["verify", str(tmp_path / "merged")]) == 0
    first = sorted((tmp_path / "merged").glob("*.safetensors"))[0]
    os.truncate(first, first.stat().st_size - 1)
    assert f"{first} is truncated" in refused(["verify", tmp_path / "merged"], capsys)
    first.unlink()
    assert f"{first} is missing" in refused(["verify", tmp_path / "merged"], capsys)


def test_nan_in_a_checkpoint_is_found(trainer, tmp_path, capsys):
    run = trainer(LoRACallback(r=4), max_epochs=1)
    run.fit(seeded(), loader())
    path = run.checkpoint_callback.best_model_path
    assert main(["verify", path]) == 0
    checkpoint = torch.load(path, weights_only=True)
    key = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][key][0, 0] = float("nan")
    torch.save(checkpoint, path)
    assert f"NaN or infinity in {key}" in refused(["verify", path], capsys)
    with open(path, "r+b") as file:
        file.truncate(1000)
    assert f"{path} is damaged" in refused(["verify", path], capsys)


# ---- convert


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_checkpoint_becomes_the_folder_that_the_run_would_write(quantization, trainer, tmp_path, capsys):
    lora = LoRACallback(r=4, train="head", quantization=quantization, output_dir=tmp_path / "out")
    run = trainer(lora, max_epochs=1)
    run.fit(seeded(), loader())
    path = run.checkpoint_callback.best_model_path
    assert main(["convert", path, "--out", str(tmp_path / "converted")]) == 0
    assert "took 'net.' off the names" in capsys.readouterr().out
    one, other = (load_adapter(seeded().net, tmp_path / name) for name in ("out", "converted"))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())
    assert main(["verify", str(tmp_path / "converted")]) == 0


def test_a_folder_becomes_a_checkpoint_that_gives_the_same_module(trainer, tmp_path):
    run = trainer(LoRACallback(r=4, train="head", output_dir=tmp_path / "out"), max_epochs=1)
    module = seeded()
    run.fit(module, loader())
    path = tmp_path / "back.ckpt"
    assert main(["convert", str(tmp_path / "out"), "--out", str(path), "--prefix", "net."]) == 0
    loaded = merge(_load(path))
    assert torch.equal(loaded(TOKENS), module.eval()(TOKENS))
    assert main(["verify", str(path)]) == 0
    trainer(LoRACallback(r=4, train="head")).test(seeded(), loader(), ckpt_path=path, verbose=False)


def _load(path):
    class Seeded(Module):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()

    return load_from_checkpoint(Seeded, path)


def test_a_pickled_adapter_by_peft_becomes_safetensors(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    said = refused(["inspect", tmp_path / "pickled"], capsys)
    assert "lightning-lora convert" in said
    assert main(["convert", str(tmp_path / "pickled"), "--out", str(tmp_path / "safe")]) == 0
    torch.manual_seed(0)
    loaded = load_adapter(Net(), tmp_path / "safe").eval()
    assert torch.allclose(loaded(TOKENS), theirs.eval()(TOKENS), atol=1e-6)


def test_code_in_a_pickle_is_not_run(folder, tmp_path, capsys):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, folder / "adapter_model.bin")
    assert "is not read" in refused(["convert", folder, "--out", tmp_path / "out"], capsys)
    torch.save({"lightning_lora": Bomb(tmp_path / "ran")}, tmp_path / "x.ckpt")
    for command in (["inspect"], ["verify"], ["convert", "--out", tmp_path / "out"]):
        assert "is not read" in refused([command[0], tmp_path / "x.ckpt", *command[1:]], capsys)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
@pytest.mark.parametrize("method", ["dora", "lora_fa"])
def test_other_methods_and_biases_are_converted_both_ways(method, bias, trainer, tmp_path):
    lora = LoRACallback(r=4, method=method, train="head", train_bias=bias, output_dir=tmp_path / "out")
    run = trainer(lora, max_epochs=1)
    module = seeded()
    run.fit(module, loader())
    assert main(["convert", run.checkpoint_callback.best_model_path, "--out", str(tmp_path / "converted")]) == 0
    one, other = (load_adapter(seeded().net, tmp_path / name) for name in ("out", "converted"))
    state = other.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["bias"] == (
        {"adapted": "lora_only"}.get(bias, bias)
    )
    path = tmp_path / "back.ckpt"
    assert main(["convert", str(tmp_path / "converted"), "--out", str(path), "--prefix", "net."]) == 0
    assert torch.equal(merge(_load(path))(TOKENS), module.eval()(TOKENS))
    assert main(["verify", str(path)]) == 0


def test_vera_is_converted_with_the_model_alone(trainer, tmp_path, capsys):
    run = trainer(LoRACallback(r=4, method="vera", output_dir=tmp_path / "out"), max_epochs=1)
    run.fit(seeded(), loader())
    path = run.checkpoint_callback.best_model_path
    said = refused(["convert", path, "--out", tmp_path / "new"], capsys)
    assert "(method 'vera') and" in said
    assert "cannot be converted without the model. Use load_from_checkpoint(...) and save_adapter(...)" in said
    said = refused(["convert", tmp_path / "out", "--out", tmp_path / "new.ckpt"], capsys)
    assert "it holds VeRA" in said
    assert "load_adapter(model, folder)" in said
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.ckpt").exists()


def test_what_cannot_be_converted_without_the_model_says_how_else(trainer, tmp_path, capsys):
    class Conv(Module):
        def __init__(self):
            super().__init__()
            self.net.conv = torch.nn.Conv2d(4, 6, 3)

        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.net.conv(torch.ones(1, 4, 3, 3)).sum()

    run = trainer(LoRACallback("conv", r=2, quantization=None), max_epochs=1)
    run.fit(Conv(), loader())
    said = refused(["convert", run.checkpoint_callback.best_model_path, "--out", tmp_path / "out"], capsys)
    assert "net.conv (conv) cannot be converted without the model. Use load_from_checkpoint" in said


def moved(module):
    """A start is a place to go from."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_checkpoint_that_started_in_the_weight_becomes_a_folder_right_on_the_original_base(init, trainer, tmp_path):
    run = trainer(LoRACallback(r=4, init=init, quantization=None, merge=False), max_epochs=1)
    module = seeded()
    run.fit(module, loader())
    moved(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    expected = module.eval()(TOKENS)
    assert main(["convert", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out")]) == 0
    loaded = load_adapter(seeded().net, tmp_path / "out").eval()
    assert torch.allclose(loaded(TOKENS), expected, atol=1e-5)  # as one update of twice the rank: other sums
    update = module.net.blocks[0]["q_proj"].merged_weight() - module.net.blocks[0]["q_proj"].base_weight()
    for path in (tmp_path / "x.ckpt", tmp_path / "out"):
        norms = {each["name"].removeprefix("net."): each["norm_update"] for each in _layers(path)}
        assert norms["blocks.0.q_proj"] == pytest.approx(update.norm().item(), rel=1e-4)  # a difference in float32
    assert main(["convert", str(tmp_path / "out"), "--out", str(tmp_path / "back.ckpt"), "--prefix", "net."]) == 0
    assert torch.allclose(_load(tmp_path / "back.ckpt")(TOKENS), expected, atol=1e-5)


def _layers(path):
    return inspect_file(path)["layers"]


def test_a_folder_whose_base_was_quantized_without_the_start_is_no_checkpoint_any_more(trainer, tmp_path, capsys):
    run = trainer(LoRACallback(r=4, init="pissa", output_dir=tmp_path / "out"), max_epochs=1)
    run.fit(seeded(), loader())
    said = refused(["convert", tmp_path / "out", "--out", tmp_path / "back.ckpt"], capsys)
    assert "quantized without the start" in said
    assert "Keep the checkpoint" in said


@pytest.mark.parametrize("method", ["dora", "lora_fa", "vera"])
def test_checkpoints_of_other_methods_are_described(method, trainer, capsys):
    run = trainer(LoRACallback(method=method, r=4), max_epochs=1)
    run.fit(seeded(), loader())
    path = run.checkpoint_callback.best_model_path
    found = inspected(path, capsys)
    assert found["method"] == method
    assert {"dora": "norm_magnitude_vector", "lora_fa": "norm_update", "vera": "norm_vera_lambda_b"}[method] in found[
        "layers"
    ][0]
    assert main(["inspect", path]) == 0
    assert main(["verify", path]) == 0


def test_adapters_on_attention_are_described_by_projection_and_no_reader_is_promised(tmp_path, capsys):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2), "out": torch.nn.Linear(8, 8)})
    save_adapter(randomize(inject(model, ["attn.q_proj", "attn.out_proj", "out"], LoRAConfig(r=2))), tmp_path / "a")
    found = inspected(tmp_path / "a", capsys)
    assert found["targets"] == ["attn.out_proj", "attn.q_proj", "out"]
    norms = {each["name"]: each["norm_update"] for each in found["layers"]}
    for name in found["targets"]:
        layer = model.get_submodule(name)
        update = (layer.merged_weight() - layer.base_weight()).double()
        assert norms[name] == pytest.approx(update.norm().item(), rel=1e-4)  # a difference in float32
    assert "adapters on nn.MultiheadAttention" in found["readers"]["vLLM"]
    assert main(["convert", str(tmp_path / "a"), "--out", str(tmp_path / "x.ckpt")]) == 0
    said = refused(["convert", tmp_path / "x.ckpt", "--out", tmp_path / "b"], capsys)
    assert "projection of an attention" in said
