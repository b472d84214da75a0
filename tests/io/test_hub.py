"""The model card, and adapters to a hub and back. The hub is a folder; it takes what HfApi takes."""

from __future__ import annotations

import inspect
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    UnsupportedError,
    inject,
    load_adapter,
    pull_adapter,
    push_adapter,
    quantize,
    save_adapter,
)
from lightning_lora.io.inspection import inspect as inspected
from tests.conftest import Net, randomize

huggingface_hub = pytest.importorskip("huggingface_hub")
TOKENS = torch.arange(12)[None] % 16


class LocalHub(huggingface_hub.HfApi):
    """A hub whose repositories are folders; arguments that HfApi does not take are errors."""

    def __init__(self, root: Path) -> None:
        super().__init__(endpoint="http://127.0.0.1:9", token=False)
        self.root = root
        self.private: list[bool] = []

    def create_repo(self, *args, **given):
        bound = inspect.signature(huggingface_hub.HfApi.create_repo).bind(self, *args, **given).arguments
        (self.root / bound["repo_id"]).mkdir(parents=True, exist_ok=bound["exist_ok"])
        self.private.append(bound["private"])

    def upload_folder(self, *args, **given):
        bound = inspect.signature(huggingface_hub.HfApi.upload_folder).bind(self, *args, **given).arguments
        self._copy(Path(bound["folder_path"]), self.root / bound["repo_id"], bound["allow_patterns"])
        return SimpleNamespace(commit_url=f"{bound['repo_id']}: {bound['commit_message']}")

    def snapshot_download(self, *args, **given):
        bound = inspect.signature(huggingface_hub.HfApi.snapshot_download).bind(self, *args, **given).arguments
        to = bound.get("local_dir") or self.root / "cache"
        self._copy(self.root / bound["repo_id"], Path(to), bound["allow_patterns"])
        return str(to)

    @staticmethod
    def _copy(source: Path, target: Path, patterns: list[str]) -> None:
        target.mkdir(parents=True, exist_ok=True)
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns):
            shutil.copyfile(source / name, target / name)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def trained():
    torch.manual_seed(0)
    return randomize(inject(Net(), "q_proj", LoRAConfig(r=2, alpha=3), train="head"))


@pytest.fixture
def hub(tmp_path) -> LocalHub:
    return LocalHub(tmp_path / "hub")


@pytest.mark.parametrize("to", [None, "here"])
def test_an_adapter_goes_to_the_hub_and_comes_back_bit_for_bit(to, hub, tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter", model_card=True)
    (tmp_path / "adapter" / "secret.env").write_text("password")
    (tmp_path / "adapter" / "optimizer.bin").write_bytes(b"x")
    assert push_adapter(tmp_path / "adapter", "me/mine", message="first", api=hub) == "me/mine: first"
    there = sorted(path.name for path in (hub.root / "me/mine").iterdir())
    assert there == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.private == [True]
    (hub.root / "me/mine" / "adapter_model.bin").write_bytes(b"a pickle")
    folder = pull_adapter("me/mine", None if to is None else tmp_path / to, api=hub)
    assert not (folder / "adapter_model.bin").exists()
    torch.manual_seed(0)
    assert torch.equal(load_adapter(Net(), folder)(TOKENS), model(TOKENS))


def test_a_damaged_adapter_is_neither_pushed_nor_pulled(hub, tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    push_adapter(tmp_path / "adapter", "me/mine", api=hub)
    for folder in (tmp_path / "adapter", hub.root / "me/mine"):
        data = bytearray((folder / "adapter_model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="SHA-256"):
        push_adapter(tmp_path / "adapter", "me/other", api=hub)
    assert not (hub.root / "me/other").exists()
    with pytest.raises(AdapterError, match="SHA-256"):
        pull_adapter("me/mine", api=hub)


def test_without_huggingface_hub_the_extra_is_named(tmp_path, monkeypatch):
    save_adapter(trained(), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    for act in (lambda: push_adapter(tmp_path, "me/mine"), lambda: pull_adapter("me/mine")):
        with pytest.raises(UnsupportedError, match=r'pip install "lightning-lora\[hub\]"'):
            act()


# ---- the card


@pytest.mark.parametrize("quantized", [False, True])
def test_the_card_says_what_the_adapter_is(quantized, tmp_path):
    model = trained()
    save_adapter(quantize(model) if quantized else model, tmp_path / "mine", model_card=True)
    card = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lightning-lora", "lora"]
    found = inspected(tmp_path / "mine")
    lines = card.text.splitlines()
    rows = dict(line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "`" in line)
    assert rows["base fingerprint"] == f"`{found['base']}`"
    assert rows["targets"] == "`blocks.0.q_proj`, `blocks.1.q_proj`"
    assert rows["trained whole"] == "`head`"
    assert f"| base in training | {found['quantization']} |" in lines
    assert {"| r | 2 |", "| alpha | 3.0 |", "| method | lora |"} <= set(lines)
    assert "PeftModel.from_pretrained" in card.text
    assert "load_adapter(model" in card.text


def test_the_base_is_named_where_the_model_knows_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.config._name_or_path = "meta/some-llama"
    save_adapter(inject(model, config=LoRAConfig(r=2)), tmp_path, model_card=True)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta/some-llama"
    assert "`LlamaForCausalLM`" in card.text


def test_a_card_is_written_anew_unless_somebody_else_wrote_it(tmp_path, caplog):
    model = trained()
    save_adapter(model, tmp_path, model_card=True)
    first = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(first.replace("| r | 2 |", "| r | 7 |"))
    save_adapter(model, tmp_path, model_card=True)
    assert (tmp_path / "README.md").read_text() == first
    (tmp_path / "README.md").write_text("my own words")
    save_adapter(model, tmp_path, model_card=True)
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert "is left as it is" in caplog.text
