"""Several adapters in one folder, as PEFT lays them out."""

import json

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    activate,
    inject,
    load_adapter,
    load_adapters,
    save_adapter,
    save_adapters,
)
from lightning_lora.model.layers import adapter_names
from tests.conftest import Net, randomize

peft = pytest.importorskip("peft")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # fp32, another order of summation


def base() -> Net:
    torch.manual_seed(0)
    return Net(width=16)


@pytest.fixture
def model() -> nn.Module:
    model = inject(base(), "q_proj", LoRAConfig(r=2))
    inject(model, ["up_proj", "downs.*"], LoRAConfig(r=3, alpha=5), name="sql")
    inject(model, "downs.1", DoRAConfig(r=4), name="chat")
    for name in ("default", "sql", "chat"):
        randomize(activate(model, name), std=0.3)
    return model


def test_peft_loads_each_adapter_from_where_it_looks_for_it(model, tokens, tmp_path):
    save_adapters(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    for name in ("sql", "chat"):
        theirs.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("default", "sql", "chat"):
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(tokens), activate(model, name)(tokens), **CLOSE)


def test_we_load_what_peft_saves(tokens, tmp_path):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    config = peft.LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False, use_dora=True)
    theirs.add_adapter("sql", config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapters(base(), tmp_path)
    assert adapter_names(ours) == ("default", "sql")
    for name in ("default", "sql"):
        theirs.set_adapter(name)
        torch.testing.assert_close(activate(ours, name)(tokens), theirs(tokens), **CLOSE)


def test_what_was_saved_is_what_is_loaded_and_saved_again(model, tokens, tmp_path):
    save_adapters(model, tmp_path / "a")
    loaded = load_adapters(base(), tmp_path / "a")
    assert torch.equal(loaded(tokens), activate(model, "default")(tokens))  # the first is active
    assert torch.equal(activate(loaded, "chat")(tokens), activate(model, "chat")(tokens))
    save_adapters(loaded, tmp_path / "b")
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 6
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_some_of_them_are_saved_and_loaded_by_name(model, tmp_path):
    save_adapters(model, tmp_path, "chat", "sql")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "sql"]
    assert adapter_names(load_adapters(base(), tmp_path, "sql")) == ("sql",)


def test_a_name_that_is_not_there_is_refused_with_those_that_are(model, tmp_path):
    with pytest.raises(AdapterError, match="no adapter 'poet'; this model has: "):
        save_adapters(model, tmp_path, "poet")
    save_adapters(model, tmp_path)
    with pytest.raises(AdapterError, match="has no adapter poet; it holds: default, chat, sql"):
        load_adapters(base(), tmp_path, "poet")
    with pytest.raises(AdapterError, match="has no adapter at all; it holds: none"):
        load_adapters(base(), tmp_path / "elsewhere")


def test_a_folder_of_several_says_so_where_one_is_expected(model, tmp_path):
    save_adapters(model, tmp_path, "chat", "sql")
    with pytest.raises(
        AdapterError, match=r"each in a folder of its own: chat, sql\. Pass that folder, or use load_ad"
    ):
        load_adapter(base(), tmp_path)


def said(caplog) -> list[str]:
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


@pytest.mark.parametrize(
    ("targets", "train", "vllm", "llama"),
    [
        ("q_proj", (), None, None),
        (
            {"q_proj": LoRAConfig(r=2, alpha=4), "up_proj": LoRAConfig(r=3, alpha=6)},
            (),
            "rank_pattern and alpha_pat",
            "alpha_",
        ),
        ({"q_proj": LoRAConfig(r=2), "up_proj": LoRAConfig(r=3)}, (), "rank_pattern (it scales", None),
        ({"q_proj": DoRAConfig(r=2)}, (), "DoRA", "DoRA"),
        ({"q_proj": LoRAConfig(r=4, scaling="rslora")}, (), None, "rsLoRA"),
        ("q_proj", ["norm"], "modules_to_save", None),
        ("q_proj", ["head"], "modules_to_save", "modules_to_save beyond norms"),
        ("embed", (), None, "adapters on embeddings"),
    ],
)
def test_what_other_readers_cannot_take_is_said_when_it_is_written(targets, train, vllm, llama, tmp_path, caplog):
    save_adapter(inject(base(), targets, LoRAConfig(r=2), train=train), tmp_path)
    expected = {"vLLM": vllm, "llama.cpp (GGUF)": llama}
    lines = [f"{reader} cannot take {what}" for reader, what in expected.items() if what is not None]
    assert len(said(caplog)) == len(lines)
    assert all(found.startswith(line) for found, line in zip(said(caplog), lines, strict=True))


def test_the_rank_vllm_has_to_be_started_with_is_said(tmp_path, caplog):
    save_adapter(inject(nn.Sequential(nn.Linear(64, 64)), "0", LoRAConfig(r=64)), tmp_path)
    assert "r=64 unless started with --max-lora-rank 64" in said(caplog)[0]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 64


def test_a_module_trained_along_with_one_adapter_is_not_overwritten_by_the_next(tokens, tmp_path):
    for name, std in (("default", 0.1), ("sql", 0.2)):
        model = randomize(inject(base(), "q_proj", LoRAConfig(r=2), train="head", name=name), std=std)
        save_adapters(model, tmp_path)
    first = load_adapter(base(), tmp_path)
    expected = first(tokens)
    with pytest.raises(AdapterError, match=r"head\.bias, head\.weight is trained along with adapter 'default'.*copy"):
        load_adapter(first, tmp_path / "sql", "sql")
    assert torch.equal(first(tokens), expected)
    load_adapter(first, tmp_path, "again")  # the same values are no conflict
    assert adapter_names(first) == ("default", "again")
