"""Adapters on ``nn.MultiheadAttention``, to and from PEFT, which adapts its packed projection as one."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import AdapterError, LoRAConfig, inject, load_adapter, save_adapter
from lightning_lora.model.layers import adapted_layers
from tests.conftest import randomize

E, H = 12, 4
X = torch.randn(3, 5, E, generator=torch.Generator().manual_seed(2))
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of the encoder layer around


class Tiny(nn.Module):
    """An encoder, a cross-attention, and a linear layer with the name that torch gives an attention's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(E, H, batch_first=True)
        self.out_proj = nn.Linear(E, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        encoded = self.encoder(x)
        return self.out_proj(self.cross(x, encoded, encoded.flip(1))[0])


def theirs(r: int = 3, **settings) -> nn.Module:
    config = peft.LoraConfig(r=r, lora_alpha=7, target_modules=["self_attn", "linear1"], **settings)
    return randomize(peft.get_peft_model(Tiny(), config), std=0.2)


def close(one: nn.Module, other: nn.Module) -> bool:
    """In fp32, with another order of summation; in training mode, since PEFT cannot be evaluated by the fused path."""
    return torch.allclose(one.train()(X), other.train()(X), atol=2e-5)


CASES = {
    "all": (["self_attn.*", "cross.*", "linear1"], LoRAConfig(r=3, alpha=5)),
    "queries and values": (["q_proj", "v_proj"], LoRAConfig(r=2, alpha=3)),
    "output alone": (["0.self_attn.out_proj", "linear2"], LoRAConfig(r=4)),
    "ranks of their own": (
        {
            "q_proj": LoRAConfig(r=1, alpha=2),
            "v_proj": LoRAConfig(r=4, alpha=8),
            "cross.out_proj": LoRAConfig(r=7, alpha=14),
            "linear1": LoRAConfig(r=2, alpha=6),
        },
        LoRAConfig(),
    ),
    "rank-stabilized": (["k_proj", "cross.out_proj"], LoRAConfig(r=3, alpha=5, scaling="rslora")),
}


@pytest.fixture(params=CASES)
def ours(request) -> nn.Module:
    return randomize(inject(Tiny(), *CASES[request.param]), std=0.2)


def test_peft_reads_ours_and_computes_the_same(ours, tmp_path):
    save_adapter(ours, tmp_path)
    assert not close(ours, Tiny())
    assert close(peft.PeftModel.from_pretrained(Tiny(), tmp_path), ours)


def test_what_was_saved_is_what_is_loaded(ours, tmp_path):
    save_adapter(ours, tmp_path / "a")
    loaded = load_adapter(Tiny(), tmp_path / "a")
    assert {path: layer.adapter("default").config for path, layer in adapted_layers(loaded).items()} == {
        path: layer.adapter("default").config for path, layer in adapted_layers(ours).items()
    }
    assert torch.equal(loaded(X), ours(X))
    save_adapter(loaded, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("split", [False, True], ids=["plain", "with an adapter on the attention"])
def test_a_linear_layer_called_as_a_projection_is_not_taken_for_it(split, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"q_proj": nn.Linear(E, E), "cross": nn.MultiheadAttention(E, H)})

    ours = randomize(inject(make(), {"q_proj": LoRAConfig(r=2)}, exclude="cross.q_proj"))
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    model = inject(make(), "cross.q_proj", name="other", config=LoRAConfig(r=2)) if split else make()
    load_adapter(model, tmp_path)
    assert torch.equal(model["q_proj"].adapter("default").lora_B, ours["q_proj"].adapter("default").lora_B)


def test_it_survives_being_saved_again_by_peft(ours, tmp_path):
    """PEFT drops the header, so the ranks are those of the packed adapter; the function is the same."""
    save_adapter(ours, tmp_path / "ours")
    peft.PeftModel.from_pretrained(Tiny(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert close(load_adapter(Tiny(), tmp_path / "theirs"), ours)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"1.self_attn": 2}}], ids=str)
def test_we_read_peft_and_compute_the_same(settings, tmp_path):
    model = theirs(**settings)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(Tiny(), tmp_path)
    assert sum("self_attn" in path for path in adapted_layers(loaded)) == 8
    assert not close(loaded, Tiny())
    assert close(loaded, model)


@pytest.mark.parametrize("version", ["0.21.3", "0.22.0.dev0", "1.0"])
def test_a_version_of_peft_whose_meaning_is_not_known_is_refused(version, tmp_path):
    """PEFT 0.21.2 adds the update of out_proj twice; a later one may not."""
    theirs().save_pretrained(tmp_path)
    settings = read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_version": version}))
    with pytest.raises(AdapterError, match=f"written by PEFT {version}, .*counts twice"):
        load_adapter(Tiny(), tmp_path)


def test_a_second_adapter_is_read_into_attention_that_has_one(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    held = inject(Tiny(), "cross.q_proj", LoRAConfig(r=2))
    inject(held, "0.self_attn.k_proj", LoRAConfig(r=2), name="other")
    assert close(load_adapter(held, tmp_path, "theirs"), model)


def test_one_attention_of_two_is_named_as_such(tmp_path):
    save_adapter(inject(Tiny(), "0.self_attn.q_proj", LoRAConfig(r=2)), tmp_path)
    assert read(tmp_path)["target_modules"] == ["encoder.layers.0.self_attn"]


def test_no_attention_is_adapted_that_ends_like_another_target(tmp_path):
    """The target ``out_proj`` alone would make PEFT adapt what is inside an attention as well."""
    save_adapter(inject(Tiny(), ["self_attn.q_proj", "linear1"], LoRAConfig(r=2)), tmp_path)
    assert read(tmp_path)["target_modules"] == ["linear1", "self_attn"]
    model = Tiny()
    model.out_proj, model.last = nn.Identity(), nn.ModuleDict({"out_proj": nn.Linear(E, 4)})
    save_adapter(inject(model, "last.out_proj", LoRAConfig(r=2)), tmp_path)
    assert read(tmp_path)["target_modules"] == ["last.out_proj"]


def test_scalings_that_differ_within_an_attention_cannot_be_said(tmp_path):
    model = inject(Tiny(), {"cross.q_proj": LoRAConfig(r=2, alpha=2), "cross.v_proj": LoRAConfig(r=2, alpha=4)})
    with pytest.raises(AdapterError, match=r"one scaling for all of cross, and q_proj, v_proj have 1\.0, 2\.0"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_attention_over_other_sizes_cannot_be_said(tmp_path):
    model = inject(nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, kdim=8)}), "q_proj", LoRAConfig(r=2))
    with pytest.raises(AdapterError, match=r"attn takes keys or values of another size .* PEFT has no adapters"):
        save_adapter(model, tmp_path / "a")


def read(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder, *, drop: str | None = None, header: bool = True, **changes) -> None:
    """Change a saved folder by hand."""
    path = folder / "adapter_model.safetensors"
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    tensors = {key: tensor for key, tensor in load_file(path).items() if drop is None or not key.endswith(drop)}
    save_file(tensors | {k: f(tensors[k]) for k, f in changes.items()}, path, metadata if header else {"format": "pt"})


IN_B = "base_model.model.cross.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({IN_B: lambda t: t + 1}, r"the bytes of .*cross.lora_B.weight are not those that were written"),
        ({IN_B: lambda t: t[:-1]}, r"cross.lora_B.weight has shape \(35, 4\), expected \(36, 4\) for r=4"),
        ({"drop": "out_proj.lora_A.weight"}, r"it lacks .*cross.base_layer.out_proj.lora_A.weight"),
        ({"drop": "cross.lora_A.weight"}, r"it lacks .*cross.lora_A.weight"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_and_changes_nothing(change, said, tmp_path):
    save_adapter(randomize(inject(Tiny(), ["cross.[qv]_proj"], LoRAConfig(r=2))), tmp_path)
    edit(tmp_path, **change)
    model = Tiny()
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, tmp_path)
    assert not adapted_layers(model)
    assert type(model.cross) is nn.MultiheadAttention


def test_an_edited_config_is_noticed(tmp_path):
    save_adapter(inject(Tiny(), "cross.[qv]_proj", LoRAConfig(r=2)), tmp_path)
    settings = read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    with pytest.raises(AdapterError, match="disagree on cross: r=4, alpha=1"):
        load_adapter(Tiny(), tmp_path)


def test_an_attention_of_the_config_without_tensors_is_named(tmp_path):
    save_adapter(inject(Tiny(), "self_attn.q_proj", LoRAConfig(r=2)), tmp_path)
    settings = read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["self_attn", "cross"]}))
    with pytest.raises(AdapterError, match=r"names layers that .* has no tensors for: cross\.k_proj"):
        load_adapter(Tiny(), tmp_path)
