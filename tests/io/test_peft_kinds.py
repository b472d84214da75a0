"""Adapters on embeddings, convolutions and transposed linear layers, to and from PEFT."""

import peft
import pytest
import torch
from torch import nn

from lightning_lora import AdapterError, LoRAConfig, inject, load_adapter, save_adapter
from tests.conftest import randomize


class Mixed(nn.Module):
    """An embedding, convolutions in one and two dimensions, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.image = nn.Conv2d(6, 5, (3, 2))
        self.head = nn.Linear(5, 4)

    def forward(self, tokens):
        x = torch.relu(self.conv(self.embed(tokens).transpose(1, 2)))
        x = self.image(x.unsqueeze(-1).expand(*x.shape, 3))
        return self.head(x.mean((2, 3)))


TOKENS = torch.arange(24).reshape(2, 12) % 12
TARGETS = ["embed", "conv", "image", "head"]


@pytest.fixture
def model():
    return Mixed()


def test_peft_reads_ours_and_computes_the_same(model, tmp_path):
    theirs = Mixed()
    theirs.load_state_dict(model.state_dict())
    randomize(inject(model, TARGETS, LoRAConfig(r=3, alpha=7)), std=0.3)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert torch.allclose(loaded(TOKENS), model(TOKENS), atol=1e-5)  # fp32, another order of summation


def test_we_read_peft_and_compute_the_same(model, tmp_path):
    base = Mixed()
    base.load_state_dict(model.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(base, tmp_path)
    assert torch.allclose(ours(TOKENS), theirs(TOKENS), atol=1e-5)


def test_what_was_saved_is_what_is_loaded(model, tmp_path):
    base = Mixed()
    base.load_state_dict(model.state_dict())
    randomize(inject(model, TARGETS, LoRAConfig(r=3)), std=0.3)
    save_adapter(model, tmp_path / "a")
    save_adapter(load_adapter(base, tmp_path / "a"), tmp_path / "b")
    assert torch.equal(base(TOKENS), model(TOKENS))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # between PEFT and transformers
def test_transposed_linear_layers_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model, theirs = transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(model.state_dict())
    randomize(inject(model, config=LoRAConfig(r=3)), std=0.1)
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    tokens = torch.arange(10)[None]
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)
    fresh = transformers.GPT2LMHeadModel(config).eval()
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
    assert torch.equal(load_adapter(fresh, tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_convolutions_in_groups_cannot_be_said_in_pefts_format(tmp_path):
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 4))
    inject(model, "*", LoRAConfig(r=2))
    with pytest.raises(AdapterError, match=r"0 is a convolution in 2 groups.*another function"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_tensors_of_another_kind_of_layer_are_refused(model, tmp_path):
    inject(model, "embed", LoRAConfig(r=3))
    save_adapter(model, tmp_path)
    other = Mixed()
    other.embed = nn.Linear(12, 8)
    with pytest.raises(AdapterError, match=r"embed is a Linear and the file has no lora_A\.weight for it"):
        load_adapter(other, tmp_path)
