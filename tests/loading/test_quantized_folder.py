"""A quantized base is saved as it is and comes back bit for bit, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    FP4Config,
    Int8Config,
    LoadError,
    LoRAConfig,
    NF3Config,
    NF4Config,
    QuantizationError,
    delete_adapter,
    inject,
    load_base,
    load_quantized,
    merge,
    parameters_on_meta,
    quantize,
    save_adapter,
    save_quantized,
)
from lightning_lora.cli.main import main
from lightning_lora.io.shards import write_shards
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import QuantizedLinear
from tests.conftest import Net, randomize
from tests.loading.folders import assert_same_base, same_bits, untouched, written
from tests.loading.test_load_base import Attending, Experts, Tied, hollow, packed_names
from tests.quantization.test_quantize import in_4bit

CONFIGS = [
    NF4Config(block_size=128, double_quant=False, compute_dtype=torch.bfloat16),
    FP4Config(),
    NF3Config(),
    Int8Config(),
]


@pytest.fixture
def base(net, tmp_path) -> Net:
    return load_base(hollow(), written(tmp_path / "dense", net.bfloat16().state_dict()))


def reloaded(model: nn.Module, folder: Path, again: nn.Module, **settings) -> nn.Module:
    return load_quantized(again, save_quantized(model, folder, **settings))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_it_comes_back_bit_for_bit(config, size, net, tmp_path, tokens):
    folder = written(tmp_path / "dense", net.bfloat16().state_dict())
    model = load_base(hollow(), folder, quantization=config)
    found = reloaded(model, tmp_path / "saved", hollow(), max_shard_size=size)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or size == "4KB"
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            again = found.get_submodule(name)
            assert (type(again), again.config, again.origin) == (type(layer), layer.config, layer.origin)
            assert again.merge_dtype is torch.bfloat16
    assert torch.equal(found(tokens), model(tokens))
    assert_same_base(inject(found, config=LoRAConfig(r=1)), inject(model, config=LoRAConfig(r=1)))


def test_tied_weights_are_written_once_and_tied_again(tmp_path):
    model = load_base(hollow(Tied), written(tmp_path / "dense", Tied().state_dict()))
    found = reloaded(model, tmp_path / "saved", hollow(Tied))
    assert "head.weight" not in load_file(tmp_path / "saved" / "quantized.safetensors")
    assert found.head.weight is found.embed.weight
    assert torch.equal(found.embed.weight, model.embed.weight)


@pytest.mark.parametrize(
    "targets", ["0.attention.*", "0.attention.k_proj", "1.up", ["1.up", "1.down", "0.out"]], ids=str
)
def test_modules_that_were_taken_apart_come_back_so(targets, tmp_path):
    def built() -> nn.Module:
        return nn.Sequential(Attending(), Experts())

    torch.manual_seed(0)
    folder = written(tmp_path / "dense", built().state_dict())
    model = load_base(hollow(built), folder, targets=targets)
    found = reloaded(model, tmp_path / "saved", hollow(built))
    assert packed_names(found) == packed_names(model)
    assert_same_base(inject(found, targets, LoRAConfig(r=1)), inject(model, targets, LoRAConfig(r=1)))


def test_what_was_quantized_under_adapters_is_a_base_once_they_are_gone(net, tmp_path, tokens):
    delete_adapter(quantize(inject(net)), "default")
    found = reloaded(net, tmp_path, hollow())
    assert torch.equal(found(tokens), net(tokens))


def test_hugging_face_models_keep_their_config_and_other_programs_find_no_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True)
    dense, saved = tmp_path / "dense", tmp_path / "saved"
    transformers.LlamaForCausalLM(config).save_pretrained(dense)
    model = load_base(hollow(transformers.LlamaForCausalLM, config), dense)
    save_quantized(model, saved)
    with parameters_on_meta():
        found = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved))
    load_quantized(found.train(), saved)
    assert all(same_bits(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(saved)
    before = (dense / "config.json").read_bytes()
    save_quantized(model, dense)
    assert (dense / "config.json").read_bytes() == before
    assert main(["inspect", str(dense)]) == 0  # the dense model is still the one there
    transformers.AutoModelForCausalLM.from_pretrained(dense)


def test_adapters_trained_over_one_load_over_the_other(base, net, tmp_path):
    """The fingerprints say that it is one base: a file is refused over another."""
    from lightning_lora import AdapterError, load_adapter

    save_quantized(base, tmp_path / "saved")
    save_adapter(randomize(inject(base, config=LoRAConfig(r=2))), tmp_path / "adapter")
    load_adapter(load_quantized(hollow(), tmp_path / "saved"), tmp_path / "adapter")
    load_adapter(net, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="another one"):
        load_adapter(Net().bfloat16(), tmp_path / "adapter")


def test_what_is_no_quantized_base_is_not_saved(net, base, tmp_path):
    folder = tmp_path / "saved"
    with pytest.raises(QuantizationError, match="nothing in Net is quantized"):
        save_quantized(net, folder)
    with pytest.raises(QuantizationError, match=r"q_proj, .* holds adapters.*save_adapter"):
        save_quantized(inject(base, config=LoRAConfig(r=2)), folder)
    assert adapted_layers(base)
    with pytest.raises(QuantizationError, match="nothing in Net is quantized"):
        save_quantized(merge(base), folder)
    with pytest.raises(QuantizationError, match=r"downs.0 is a layer of bitsandbytes'"):
        save_quantized(in_4bit(Net(), ["downs.0"]), folder)
    assert not folder.exists()


def test_the_folder_of_an_adapter_is_left_alone(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(QuantizationError, match="holds an adapter"):
        save_quantized(base, tmp_path)


def test_a_save_that_fails_leaves_the_last_one(base, tmp_path, monkeypatch):
    save_quantized(base, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

    def failing(*args, **settings):
        raise OSError("no room")

    monkeypatch.setattr("lightning_lora.io.shards._verify", failing)
    with pytest.raises(OSError, match="no room"):
        save_quantized(base, tmp_path, max_shard_size="4KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_each_load_reads_its_own_kind_of_folder(base, tmp_path):
    save_quantized(base, tmp_path / "saved")
    with pytest.raises(LoadError, match=r"neither model.safetensors nor .*; quantized files .* load_quantized"):
        load_base(hollow(), tmp_path / "saved")
    with pytest.raises(LoadError, match=r"no base that save_quantized has written. load_base"):
        load_quantized(hollow(), tmp_path / "dense")


def changed(folder: Path, change) -> Path:
    """Let ``change`` change the header's entry and the tensors of a saved base."""
    file = folder / "quantized.safetensors"
    with safe_open(file, "pt") as opened:
        entry = json.loads(opened.metadata()["lightning_lora"])
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(entry, tensors)
    save_file(tensors, file, {"lightning_lora": json.dumps(entry)})
    return folder


def layer(entry: dict, **stored) -> None:
    entry["layers"]["downs.0"].update(stored)


DAMAGE = {
    "is damaged: its bytes": lambda _, tensors: tensors["downs.0.codes"][3].bitwise_xor_(1),
    "lacks head.bias; the model has no tail": lambda _, tensors: tensors.update(tail=tensors.pop("head.bias")),
    "lacks 'downs.0.absmax'": lambda _, tensors: tensors.pop("downs.0.absmax"),
    "has no downs.7": lambda entry, _: entry["layers"].update({"downs.7": entry["layers"]["downs.0"]}),
    "downs.0 does not fit the model: 'nf5' is no": lambda entry, _: layer(entry, storage="nf5"),
    "downs.0 does not fit the model: a weight of": lambda entry, _: layer(entry, storage="nf4/32 double-quantized"),
    "downs.0 does not fit the model: constants of": lambda entry, _: layer(entry, storage="nf4/64"),
    "downs.0 does not fit the model: compute_dtype": lambda entry, _: layer(entry, compute_dtype="int8"),
    "embed is a linear layer there": lambda entry, _: entry["layers"].update(embed=entry["layers"]["downs.0"]),
    "damaged header (ValueError(\"'float12'": lambda entry, _: layer(entry, dtype="float12"),
    "damaged header (KeyError": lambda entry, _: entry.pop("sha256"),
    "is of format 9": lambda entry, _: entry.update(version=9),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damage_is_refused_and_the_model_stays_as_it_was(said, base, tmp_path):
    changed(save_quantized(base, tmp_path / "saved"), DAMAGE[said])
    model = hollow()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(LoadError) as error:
        load_quantized(model, tmp_path / "saved")
    assert said in str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert untouched(model)


def test_a_model_of_another_shape_is_refused(base, tmp_path):
    save_quantized(base, tmp_path / "saved")
    with pytest.raises(LoadError, match=r"does not fit the model: a weight of shape \(32, 32\)"):
        load_quantized(hollow(Net, 32), tmp_path / "saved")
    with pytest.raises(LoadError, match=r"which has no blocks.1.q_proj"):
        load_quantized(hollow(Net, 64, 1), tmp_path / "saved")
    with pytest.raises(LoadError, match="is adapted or quantized already"):
        load_quantized(base, tmp_path / "saved")


def test_inspect_names_it_and_verify_compares_every_tensor(base, tmp_path, capsys):
    folder = save_quantized(base, tmp_path / "saved")
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "quantized base" in said
    assert "nf4/64 double-quantized (6 layers)" in said
    assert main(["verify", str(folder)]) == 0
    assert "SHA-256 of every tensor" in capsys.readouterr().out
    changed(folder, DAMAGE["is damaged: its bytes"])
    assert main(["verify", str(folder)]) == 1
    assert "downs.0.codes is damaged" in capsys.readouterr().err


def test_other_names_for_files_leave_those_of_a_model_alone(tmp_path):
    """What is written under one naming is never swept by a save under another."""
    from lightning_lora.io.shards import QUANTIZED, Part

    parts = [Part({name: torch.ones(64)}, lambda name=name: {name: torch.ones(64)}) for name in ("a", "b")]
    for naming in (None, QUANTIZED):
        for size in ("300B", "5GB", "300B"):
            chosen = {} if naming is None else {"naming": naming}
            write_shards(tmp_path, parts, max_shard_size=size, metadata={}, **chosen)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[0].partition(".")[0] for name in names] == ["model"] * 3 + ["quantized"] * 3
