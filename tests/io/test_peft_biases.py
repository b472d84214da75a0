"""Biases trained along with an adapter, to PEFT and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import AdapterError, LoRAConfig, VeRAConfig, adapter_state_dict, inject, load_adapter, save_adapter
from tests.conftest import Net, randomize

peft = pytest.importorskip("peft")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # fp32, another order of summation
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["q_proj", "up_proj", "downs.1"]  # with a bias and without, in one list and another


def base() -> Net:
    torch.manual_seed(0)
    return Net(width=16)


@pytest.fixture(params=["adapted", "all"])
def choice(request) -> str:
    return request.param


@pytest.mark.parametrize("config", [LoRAConfig(r=2), VeRAConfig(r=2)], ids=["LoRA", "VeRA"])
def test_peft_gives_our_outputs_with_our_biases(choice, config, tokens, tmp_path):
    model = randomize(inject(base(), TARGETS, config, train="head", train_bias=choice), std=0.3)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(theirs(tokens), model(tokens), **CLOSE)
    assert torch.equal(theirs.base_model.model.norm.bias, model.norm.bias)
    assert theirs.peft_config["default"].bias == {"all": "all"}.get(choice, f"{config.method}_only")


def test_what_was_saved_is_what_is_loaded_and_saved_again(choice, tokens, tmp_path):
    model = randomize(inject(base(), TARGETS, LoRAConfig(r=2), train="head", train_bias=choice), std=0.3)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(base(), tmp_path / "a")
    assert torch.equal(loaded(tokens), model(tokens))
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (loaded, model)]
    assert trained[0] == trained[1]
    assert ("norm.bias" in trained[0]) == (choice == "all")
    save_adapter(loaded, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    load_adapter(randomize(loaded), tmp_path / "a")
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("whole", [None, ["head"]])
def test_we_give_pefts_outputs_with_its_biases(bias, whole, tokens, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias=bias, modules_to_save=whole)
    theirs = randomize(peft.get_peft_model(base(), config), std=0.3)
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(base(), tmp_path)
    torch.testing.assert_close(loaded(tokens), theirs(tokens), **CLOSE)
    assert torch.equal(loaded.norm.bias, theirs.base_model.model.norm.bias)
    save_adapter(loaded, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "again"))
    torch.testing.assert_close(again(tokens), theirs(tokens), **CLOSE)


def test_a_frozen_model_is_saved_with_its_biases(tmp_path):
    model = randomize(inject(base(), TARGETS, LoRAConfig(r=2), train_bias="all"))
    expected = adapter_state_dict(model)
    assert set(adapter_state_dict(model.requires_grad_(False))) == set(expected)
    assert "base_model.model.norm.bias" in expected
    assert "base_model.model.blocks.0.up_proj.base_layer.bias" in expected


@pytest.mark.parametrize(
    ("end", "change", "said"),
    [
        ("norm.bias", None, r"bias='all', and .* has no base_model\.model\.norm\.bias of a layer"),
        ("norm.bias", lambda t: t[1:], r"norm\.bias has shape \(15,\) in the file, the model has \(16,\)"),
    ],
)
def test_biases_that_do_not_fit_are_refused_and_nothing_changes(end, change, said, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    randomize(peft.get_peft_model(base(), config)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (key,) = [key for key in tensors if key.endswith(end)]
    tensor = tensors.pop(key)
    save_file(tensors | ({} if change is None else {key: change(tensor).contiguous()}), tmp_path / WEIGHTS)
    model = base()
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), base().parameters(), strict=True))


def test_biases_that_the_config_does_not_announce_are_refused(tmp_path):
    randomize(inject(model := base(), TARGETS, LoRAConfig(r=2), train_bias="adapted"))
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"bias": "none"}))
    with pytest.raises(AdapterError, match=r"base_layer\.bias.*neither a tensor of an adapter"):
        load_adapter(base(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"bias": "vera_only"}))
    with pytest.raises(AdapterError, match="bias is 'vera_only', expected one of none, all, lora_only"):
        load_adapter(base(), tmp_path)


def test_biases_of_an_attention_are_refused_by_name(tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    config = peft.LoraConfig(r=2, target_modules=["attn"], bias="lora_only")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"attn\.q_proj.* belongs to an nn\.MultiheadAttention"):
        load_adapter(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), tmp_path)


def test_biases_of_another_choice_are_no_reason_to_load_over_what_is_there(tmp_path):
    save_adapter(inject(base(), TARGETS, LoRAConfig(r=2), train_bias="adapted"), tmp_path)
    with pytest.raises(AdapterError, match=r"biases: blocks\.0\.up_proj, .*, downs\.1 only there"):
        load_adapter(inject(base(), TARGETS, LoRAConfig(r=2)), tmp_path)


def test_readers_that_take_no_biases_are_named(tmp_path, caplog):
    save_adapter(inject(base(), TARGETS, LoRAConfig(r=2), train_bias="adapted"), tmp_path)
    assert [line.getMessage().count("cannot take bias='lora_only'") for line in caplog.records] == [1, 1]
