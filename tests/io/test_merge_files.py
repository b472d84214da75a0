"""Merging files gives what loading, merging and saving the model gives, without the model."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    DoRAConfig,
    FP4Config,
    Int8Config,
    LoRAConfig,
    LoRAFAConfig,
    NF2Config,
    NF3Config,
    VeRAConfig,
    export_merged,
    inject,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.base import dense_weight
from tests.conftest import Net, randomize
from tests.io.files import assert_equal, read


class Kinds(Net):
    """Every kind of layer, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.batch = nn.BatchNorm2d(6)


TARGETS = ["q_proj", "up_proj", "downs.*", "embed", "conv"]


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(Kinds().state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "kinds"}')
    (tmp_path / "base" / "modeling.py").write_text("raise SystemExit")
    return tmp_path / "base"


def trained(base: Path, *, quantized: bool = False, **settings) -> nn.Module:
    model = Kinds()
    model.load_state_dict(load_file(base / "model.safetensors"))
    randomize(inject(model, TARGETS, LoRAConfig(r=2), **settings))
    return quantize(model) if quantized else model


def run(base: Path, adapter: Path, out: Path, *more: str) -> int:
    return main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *more])


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_writes_the_very_bytes_that_the_live_model_exports(quantized, dtype, size, base, tmp_path, capsys):
    model = trained(base, quantized=quantized, train="head")
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", dtype=None if dtype is None else getattr(torch, dtype))
    more = ["--max-shard-size", size, *(["--dtype", dtype] if dtype else [])]
    assert run(base, tmp_path / "adapter", tmp_path / "out", *more) == 0
    assert_equal(read(tmp_path / "out"), read(tmp_path / "live"))
    said = capsys.readouterr().out
    assert ("dequantized" in said) == quantized
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "kinds"
    assert not (tmp_path / "out" / "modeling.py").exists()


@pytest.mark.filterwarnings("ignore:.*NF2")
@pytest.mark.parametrize("config", [FP4Config(), NF3Config(double_quant=False), NF2Config(), Int8Config()])
def test_each_storage_is_made_again_and_merged_as_the_live_model_is(config, base, tmp_path, capsys):
    model = quantize(trained(base), config)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live", max_shard_size="40KB")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    assert_equal(read(tmp_path / "out"), read(tmp_path / "live"))
    assert config.storage in capsys.readouterr().out


def test_onto_the_original_has_to_be_asked_for_and_prints_the_drift(base, tmp_path, capsys):
    """The relative error of NF4 on normal weights is 0.09 (QLoRA's codec); uniform ones, as here, have less."""
    model = trained(base, quantized=True)
    save_adapter(model, tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "out", "--onto", "original") == 0
    said = capsys.readouterr().out
    drift = float(re.search(r"by (\d+\.\d+)% on average", said)[1])
    assert 3 < drift < 12
    plain = read(base)["downs.0.weight"]
    adapter = model.downs[0].adapter("default")
    assert torch.allclose(read(tmp_path / "out")["downs.0.weight"], adapter.merged(plain), atol=1e-7)


def test_shards_of_the_base_are_read(base, tmp_path):
    model = trained(base)
    save_adapter(model, tmp_path / "adapter")
    tensors = read(base)
    names = sorted(tensors)
    (tmp_path / "shards").mkdir()
    for index, part in enumerate((names[:10], names[10:])):
        save_file({name: tensors[name] for name in part}, tmp_path / "shards" / f"{index}.safetensors")
    weights = {name: f"{int(name in names[10:])}.safetensors" for name in names}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert run(tmp_path / "shards", tmp_path / "adapter", tmp_path / "out") == 0
    export_merged(model, tmp_path / "live")
    assert_equal(read(tmp_path / "out"), read(tmp_path / "live"))


def test_hugging_faces_transposed_layers_are_merged_as_stored(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    randomize(inject(model, ["c_attn", "c_fc"], LoRAConfig(r=2)))
    save_adapter(model, tmp_path / "adapter")
    assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(8)[None]
    expected = model.eval()(tokens).logits
    # the order of summation alone differs, in float32
    assert (loaded(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tied_weight_is_refused(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    untied = transformers.LlamaForCausalLM(config)
    randomize(inject(untied, ["q_proj", "embed_tokens"], LoRAConfig(r=2)))
    save_adapter(untied, tmp_path / "adapter")
    tied = transformers.LlamaForCausalLM(copy.deepcopy(config))
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "base")
    assert run(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--allow-base-mismatch") == 1
    assert "model.embed_tokens shares its weight with another layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def change(base: Path, **tensors: Tensor | None) -> None:
    found = read(base) | tensors
    save_file({k: v for k, v in found.items() if v is not None}, base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    {
        "another base": (
            lambda base, _: change(base, **{"downs.0.weight": torch.randn(64, 128)}),
            r"another one in downs\.0 \(other values\)",
        ),
        "a layer missing": (lambda base, _: change(base, **{"downs.0.weight": None}), r"downs\.0"),
        "another width": (
            lambda base, _: change(base, **{"downs.0.weight": torch.randn(64, 100)}),
            r"downs\.0\.lora_A has shape",
        ),
        "NaN in the base": (
            lambda base, _: change(base, **{"downs.0.weight": torch.full((64, 128), torch.nan)}),
            "another one in|NaN",
        ),
        "no base": (lambda base, _: (base / "model.safetensors").unlink(), "neither model.safetensors nor"),
        "a pickled base": (
            lambda base, _: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which is not read",
        ),
        "a truncated base": (lambda base, _: os.truncate(base / "model.safetensors", 5000), "truncated"),
        "an index that leads elsewhere": (
            lambda base, _: (
                (base / "model.safetensors").unlink(),
                (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
            ),
            "no safetensors file in that folder",
        ),
        "no adapter": (lambda _, adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        "a damaged adapter": (
            lambda _, adapter: os.truncate(adapter / "adapter_model.safetensors", 3000),
            "adapter_model.safetensors is truncated",
        ),
    }.values(),
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(damage, words, base, tmp_path, capsys):
    save_adapter(trained(base), tmp_path / "adapter")
    damage(base, tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_the_base_is_never_written_over(base, tmp_path, capsys):
    save_adapter(trained(base), tmp_path / "adapter")
    before = (base / "model.safetensors").read_bytes()
    assert run(base, tmp_path / "adapter", base) == 1
    assert "is the base model's folder" in capsys.readouterr().err
    assert (base / "model.safetensors").read_bytes() == before
    assert run(base, tmp_path / "adapter", tmp_path / "adapter") == 1
    assert "add the update twice" in capsys.readouterr().err


def test_a_mismatch_can_be_allowed(base, tmp_path):
    save_adapter(trained(base), tmp_path / "adapter")
    change(base, **{"downs.0.weight": torch.randn(64, 128)})
    assert run(base, tmp_path / "adapter", tmp_path / "out", "--allow-base-mismatch") == 0


# ---- attention, and adapters that started in the base weight


class Attending(nn.Module):
    """torch's attention, which packs three projections into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.out = nn.Linear(64, 64)


@pytest.fixture
def attending(tmp_path) -> Path:
    save_file(Attending().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("targets", [["enc.self_attn.*_proj", "out"], "enc.self_attn.v_proj", "enc.self_attn.out_proj"])
def test_adapters_on_attention_are_merged_into_the_packed_tensor(targets, quantized, attending, tmp_path, capsys):
    model = randomize(inject(Attending(), targets, LoRAConfig(r=2)))
    if quantized:
        quantize(model)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live")
    assert run(attending, tmp_path / "adapter", tmp_path / "out") == 0, capsys.readouterr().err
    assert_equal(read(tmp_path / "out"), read(tmp_path / "live"))
    assert main(["verify", str(tmp_path / "adapter"), "--base", str(attending)]) == 0
    assert "base is the one trained on" in capsys.readouterr().out


def started(attending: Path, init: str, *, quantized: bool) -> nn.Module:
    model = inject(Attending(), ["enc.linear1", "out"], LoRAConfig(r=2, init=init))
    if quantized:
        quantize(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_started_in_the_weight_is_merged_as_the_live_model_is(init, attending, tmp_path):
    model = started(attending, init, quantized=False)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live")
    assert run(attending, tmp_path / "adapter", tmp_path / "out") == 0
    live = read(tmp_path / "live")
    for key, tensor in read(tmp_path / "out").items():
        # The update is written as one of twice the rank, so that its sums are in another order: a few last places.
        assert torch.allclose(tensor, live[key], rtol=0, atol=1e-6 * live[key].abs().max().item()), key


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_over_a_base_quantized_without_the_start_the_trained_weight_is_refused_and_the_drift_is_a_bound(
    init, attending, tmp_path, capsys
):
    model = started(attending, init, quantized=True)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "live")
    assert run(attending, tmp_path / "adapter", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert re.search(r"enc\.linear1.*started in the base weight.*export_merged.*--onto original", said, re.DOTALL), said
    assert not (tmp_path / "out").exists()
    assert run(attending, tmp_path / "adapter", tmp_path / "out", "--onto", "original") == 0
    said = capsys.readouterr().out
    assert "may differ" in said
    found, live, base = read(tmp_path / "out"), read(tmp_path / "live"), load_file(attending)
    for name in ("enc.linear1", "out"):
        plain = quantize(inject(nn.Sequential(copy.deepcopy(Attending().get_submodule(name))), "0", LoRAConfig(r=1)))
        bound = (dense_weight(plain[0].base_layer, torch.float32) - base[f"{name}.weight"]).norm()
        assert (found[f"{name}.weight"] - live[f"{name}.weight"]).norm() <= bound * 1.0001, name  # sums in float32


# ---- other methods, and biases

LINEAR = ["q_proj", "up_proj", "downs.*"]
METHODS: dict[str, tuple[AdapterConfig, list[str]]] = {
    "dora": (DoRAConfig(r=2), TARGETS),
    "lora_fa": (LoRAFAConfig(r=2), [*LINEAR, "conv"]),
    "vera": (VeRAConfig(r=4), LINEAR),
}


def plain(base: Path) -> nn.Module:
    model = Kinds()
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("config", "targets"), METHODS.values(), ids=METHODS)
def test_each_method_and_its_biases_are_merged_as_the_live_model_is(config, targets, quantized, bias, base, tmp_path):
    model = randomize(inject(plain(base), targets, config, train="head", train_bias=bias), std=0.2)
    quantize(model) if quantized else None
    save_adapter(model, tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    export_merged(model, tmp_path / "live")
    found = read(tmp_path / "out")
    assert_equal(found, read(tmp_path / "live"))
    changed = [key for key, tensor in plain(base).state_dict().items() if not torch.equal(found[key], tensor)]
    assert ("blocks.0.up_proj.bias" in changed) == (bias != "none")
    assert ("norm.bias" in changed) == (bias == "all")


def test_a_dora_merged_into_the_original_weights_is_the_one_loaded_over_them(base, tmp_path):
    model = quantize(randomize(inject(plain(base), LINEAR, DoRAConfig(r=2)), std=0.2))
    save_adapter(model, tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "out", "--onto", "original") == 0
    assert_equal(read(tmp_path / "out"), merge(load_adapter(plain(base), tmp_path / "adapter")).state_dict())


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_what_peft_saved_is_merged_as_peft_merges_it(method, base, tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    config = peft.VeraConfig(**settings) if method == "vera" else peft.LoraConfig(**settings, use_dora=True)
    theirs = randomize(peft.get_peft_model(plain(base), config), std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    expected, found = theirs.merge_and_unload().state_dict(), read(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    for key, tensor in found.items():
        # fp32, another order of summation
        torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-5, msg=key)


def test_a_vera_whose_header_is_lost_is_told_by_its_projections(base, tmp_path):
    model = randomize(inject(plain(base), LINEAR, VeRAConfig(r=4)), std=0.2)
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path)
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 0
    assert_equal(read(tmp_path / "out"), merge(model).state_dict())


def test_a_vera_with_other_projections_is_not_merged(base, tmp_path, capsys):
    save_adapter(randomize(inject(plain(base), LINEAR, VeRAConfig(r=4))), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.vera_A"].mul_(2)
    save_file(tensors, path)
    assert run(base, tmp_path / "adapter", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'adapter'}: its projections are not those that its seed draws here" in said
    assert not (tmp_path / "out").exists()
