"""Every method that PEFT's format has, over every kind of layer, to PEFT and back: the same outputs in both directions.

Whatever is trained is drawn at random, so that nothing passes by being what it started as.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    VeRAConfig,
    inject,
    load_adapter,
    quantize,
    save_adapter,
)
from lightning_lora.model.layers import adapted_layers
from tests.conftest import randomize

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT, of models with both kinds of linear layer
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# fp32 outputs of size about 1 after a few layers; the sums run in another order
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


class Every(nn.Module):
    """One layer of each kind, and linear layers of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 5, (3, 2), padding=1)
        self.conv3 = nn.Conv3d(5, 4, 2, padding=1, bias=False)
        self.wide = nn.Linear(4, 10)
        self.transposed = transformers.pytorch_utils.Conv1D(7, 10)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.conv1(self.embed(tokens).transpose(1, 2)))
        x = torch.relu(self.conv2(x.unsqueeze(-1).expand(*x.shape, 3)))
        x = self.conv3(x.unsqueeze(-1).expand(*x.shape, 2)).mean((2, 3, 4))
        return self.head(self.norm(torch.tanh(self.transposed(torch.tanh(self.wide(x))))))


X = torch.arange(24).reshape(2, 12) % 12
LINEAR = ["wide", "transposed", "head"]
ALL = ["embed", "conv1", "conv2", "conv3", *LINEAR]


def base() -> Every:
    torch.manual_seed(0)
    return randomize(Every(), std=0.4)


def trained(targets: object, config: object = None, **settings: object) -> nn.Module:
    model = inject(base(), targets, *([] if config is None else [config]), **settings)
    torch.manual_seed(1)
    return randomize(model, std=0.3)


def read_by_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base(), str(folder))


def theirs(config: object) -> nn.Module:
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(1)
    return randomize(model, std=0.3)


def settings_in(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def configs(model: nn.Module, name: str = "default") -> dict[str, object]:
    return {path: layer.adapter(name).config for path, layer in adapted_layers(model).items()}


OURS = {
    "LoRA": (ALL, LoRAConfig(r=3, alpha=5)),
    "rsLoRA": (ALL, LoRAConfig(r=3, alpha=5, scaling="rslora")),
    "DoRA": (ALL, DoRAConfig(r=3, alpha=5)),
    "rank-stabilized DoRA": (ALL, DoRAConfig(r=2, alpha=5, scaling="rslora")),
    "DoRA of several ranks": ({"embed": DoRAConfig(r=2), "conv?": DoRAConfig(r=3), "wide": DoRAConfig(r=4)}, None),
    "LoRA-FA": (ALL[1:], LoRAFAConfig(r=3, alpha=5)),
    "LoRA-FA and LoRA": ({"wide": LoRAFAConfig(r=3, alpha=5), "head": LoRAConfig(r=2, alpha=1)}, None),
    "VeRA": (LINEAR, VeRAConfig(r=6, dropout=0.25, d_initial=0.3, seed=3)),
    "VeRA of one size": ("head", VeRAConfig(r=4, seed=-5)),
    "VeRA of several ranks and seeds": (
        {"wide": VeRAConfig(r=5), "transposed": VeRAConfig(r=3, seed=1), "head": VeRAConfig(r=3, seed=2)},
        None,
    ),
    "VeRA with PEFT's projections": (LINEAR, VeRAConfig(r=6, seed=7, largest_in=10, largest_out=10)),
    "VeRA within larger projections": (LINEAR, VeRAConfig(r=6, seed=7, largest_in=20, largest_out=11)),
}


@pytest.fixture(params=OURS)
def ours(request) -> nn.Module:
    targets, config = OURS[request.param]
    return trained(targets, config, train=["norm"]).eval()


def test_peft_gives_our_outputs_from_our_folder(ours, tmp_path):
    save_adapter(ours, tmp_path)
    assert (ours(X) - base()(X)).abs().max() > 0.1
    torch.testing.assert_close(read_by_peft(tmp_path).eval()(X), ours(X), **CLOSE)


def test_what_was_saved_is_what_is_loaded_and_saved_again(ours, tmp_path):
    save_adapter(ours, tmp_path / "a")
    loaded = load_adapter(base(), tmp_path / "a").eval()
    assert [type(layer.adapter("default")) for layer in adapted_layers(loaded).values()] == [
        type(layer.adapter("default")) for layer in adapted_layers(ours).values()
    ]
    assert configs(loaded) == configs(ours)
    assert torch.equal(loaded(X), ours(X))
    save_adapter(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_loads_into_the_adapter_it_was_written_from(ours, tmp_path):
    save_adapter(ours, tmp_path)
    expected = ours(X)
    randomize(ours)
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(X), expected)


NOT_DRAWN_WITHOUT_OUR_HEADER = ["VeRA of several ranks and seeds", "VeRA within larger projections"]


@pytest.mark.parametrize("ours", [name for name in OURS if name not in NOT_DRAWN_WITHOUT_OUR_HEADER], indirect=True)
def test_peft_saves_our_folder_again_and_we_read_it(ours, tmp_path):
    save_adapter(ours, tmp_path / "ours")
    read_by_peft(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(load_adapter(base(), tmp_path / "theirs").eval()(X), ours(X), **CLOSE)


@pytest.mark.parametrize("ours", NOT_DRAWN_WITHOUT_OUR_HEADER, indirect=True)
def test_projections_that_cannot_be_drawn_again_are_refused(ours, tmp_path):
    save_adapter(ours, tmp_path / "ours")
    read_by_peft(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    model = base()
    with pytest.raises(AdapterError, match="its projections are not those that its seed draws here"):
        load_adapter(model, tmp_path / "theirs")
    assert not adapted_layers(model)


THEIRS = {
    "LoRA": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "target_modules": ALL}),
    "rsLoRA": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "target_modules": ALL, "use_rslora": True}),
    "DoRA": (peft.LoraConfig, {"r": 3, "lora_alpha": 5, "target_modules": ALL, "use_dora": True}),
    "DoRA with patterns": (
        peft.LoraConfig,
        {"r": 3, "target_modules": ALL, "use_dora": True, "rank_pattern": {"head": 2}, "alpha_pattern": {"embed": 9}},
    ),
    "orthogonal": (peft.LoraConfig, {"r": 2, "target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "VeRA": (peft.VeraConfig, {"r": 6, "target_modules": LINEAR, "projection_prng_key": 11, "d_initial": 0.5}),
    "VeRA of one layer": (peft.VeraConfig, {"r": 6, "target_modules": ["wide"], "vera_dropout": 0.25}),
    "VeRA without its projections": (peft.VeraConfig, {"r": 6, "target_modules": LINEAR, "save_projection": False}),
}


@pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT, where it is told not to save projections
@pytest.mark.parametrize("name", THEIRS)
def test_we_give_pefts_outputs_from_its_folder(name, tmp_path):
    make, settings = THEIRS[name]
    model = theirs(make(**settings, modules_to_save=["norm"])).eval()
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(), tmp_path).eval()
    assert (model(X) - base()(X)).abs().max() > 0.1
    torch.testing.assert_close(loaded(X), model(X), **CLOSE)
    save_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(read_by_peft(tmp_path / "again").eval()(X), model(X), **CLOSE)


def test_peft_reads_pefts_projections_back_as_it_wrote_them(tmp_path):
    theirs(peft.VeraConfig(**THEIRS["VeRA"][1])).save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(base(), tmp_path / "theirs"), tmp_path / "ours")
    first, second = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    one, other = (settings_in(tmp_path / who) for who in ("theirs", "ours"))
    assert {key: one[key] for key in ("r", "projection_prng_key", "d_initial", "vera_dropout")} == {
        key: other[key] for key in ("r", "projection_prng_key", "d_initial", "vera_dropout")
    }


def edit(folder: Path, **changes: object) -> None:
    """Change tensors of a folder by hand: to another value, or, with None, away. The header goes."""
    tensors = load_file(folder / WEIGHTS)
    for end, change in changes.items():
        (key,) = [key for key in tensors if key.endswith(end)]
        tensor = tensors.pop(key)
        tensors |= {} if change is None else {key: change(tensor).contiguous()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vera_A": lambda t: t.bfloat16()}, "its projections are not those that its seed draws"),
        ({"vera_B": lambda t: t + 1}, "its projections are not those that its seed draws"),
        ({"vera_A": lambda t: t[:, 1:]}, r"shapes .*'A': \(6, 9\).*, expected .*'A': \(6, 10\)"),
        ({"wide.vera_lambda_d": lambda t: t[1:]}, r"wide.vera_lambda_d has shape \(5,\), expected \(6,\) for r=6"),
        ({"wide.vera_lambda_b": lambda t: t[1:]}, r"wide.vera_lambda_b has shape \(9,\), expected \(10,\)"),
        ({"wide.vera_lambda_b": None}, "wide has only one of vera_lambda_b and vera_lambda_d"),
    ],
)
def test_a_damaged_vera_says_what_is_wrong_and_changes_nothing(changes, said, tmp_path):
    theirs(peft.VeraConfig(r=6, target_modules=LINEAR)).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    model = base()
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, tmp_path)
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"conv2.lora_magnitude_vector": lambda t: t.flatten()}, r"conv2.lora_magnitude_vector has shape \(5,\)"),
        ({"wide.lora_magnitude_vector": None}, "wide is a Linear and the file has no lora_magnitude_vector for it"),
    ],
)
def test_a_damaged_dora_says_what_is_wrong(changes, said, tmp_path):
    save_adapter(trained(ALL, DoRAConfig(r=2)), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(AdapterError, match=said):
        load_adapter(base(), tmp_path)


def test_magnitudes_of_an_adapter_that_is_no_dora_are_refused(tmp_path):
    save_adapter(trained("wide", DoRAConfig(r=2)), tmp_path)
    edit(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(settings_in(tmp_path) | {"use_dora": False}))
    with pytest.raises(AdapterError, match="wide has lora_magnitude_vector in the file, which lora does not"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"wide": LoRAConfig(r=2), "head": DoRAConfig(r=2)}, "has DoRA on head; LoRA on wide. Give each method"),
        ({"wide": LoRAFAConfig(r=2), "head": VeRAConfig(r=2)}, "has LoRA on wide; VeRA on head. Give each method"),
        ({"wide": LoRAConfig(r=2, dropout=0.5), "head": LoRAConfig(r=2)}, "one dropout for all layers, .* 0.0, 0.5"),
        ({"wide": VeRAConfig(r=2, dropout=0.5), "head": VeRAConfig(r=2)}, "one dropout for all layers, .* 0.0, 0.5"),
        ({"wide": LoRAConfig(r=2, scaling="rslora"), "head": LoRAConfig(r=2)}, "one scaling for all layers"),
    ],
)
def test_what_one_config_of_pefts_cannot_say_is_refused_when_it_is_saved(targets, said, tmp_path):
    model = trained(targets)
    with pytest.raises(AdapterError, match=said):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("config", [DoRAConfig(r=2), VeRAConfig(r=2)])
def test_on_an_attention_pefts_format_has_lora_alone(config, tmp_path):
    model = inject(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), "q_proj", config)
    with pytest.raises(AdapterError, match=f"LoRA alone on an attention, and attn has {config.method} on q_proj"):
        save_adapter(model, tmp_path)


def test_lora_fa_on_an_attention_is_lora_to_peft_and_lora_fa_to_us(tmp_path):
    def attention() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})

    model = randomize(inject(attention(), ["q_proj", "out_proj"], LoRAFAConfig(r=3, alpha=5)), std=0.3)
    save_adapter(model, tmp_path)
    x = torch.randn(5, 2, 8)
    expected = model["attn"](x, x, x)[0]
    loaded = load_adapter(attention(), tmp_path)
    assert configs(loaded) == configs(model)
    torch.testing.assert_close(loaded["attn"](x, x, x)[0], expected, rtol=0, atol=0)
    their = peft.PeftModel.from_pretrained(attention(), str(tmp_path)).base_model.model
    torch.testing.assert_close(their["attn"](x, x, x)[0], expected, **CLOSE)


@pytest.mark.parametrize("first", ["quantize", "load"])
def test_a_dora_over_nf4_comes_back_bit_for_bit_over_nf4(first, tmp_path):
    """Its magnitudes are lengths of rows of the quantized weight, and are so too if that is made after loading."""
    model = randomize(quantize(inject(base(), ["wide", "head"], DoRAConfig(r=2))), std=0.3).eval()
    save_adapter(model, tmp_path)
    if first == "load":
        loaded = quantize(load_adapter(base(), tmp_path)).eval()
    else:
        loaded = load_adapter(quantize(inject(base(), ["wide", "head"], DoRAConfig(r=2))), tmp_path).eval()
    assert torch.equal(loaded(X), model(X))


def test_a_dora_over_the_dense_weight_is_scaled_to_the_rows_of_one_that_is_quantized_later(tmp_path):
    model = trained("wide", DoRAConfig(r=2))
    save_adapter(model, tmp_path)
    expected = quantize(model).eval()(X)
    assert torch.equal(quantize(load_adapter(base(), tmp_path)).eval()(X), expected)


def test_lora_fa_is_trained_on_as_lora_fa(tmp_path):
    save_adapter(trained("wide", LoRAFAConfig(r=3)), tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == ["wide.adapters.default.lora_B"]


SAVE = """
import sys, torch
from dataclasses import replace
from torch import nn
from lightning_lora import DoRAConfig, LoRAConfig, LoRAFAConfig, VeRAConfig, inject, save_adapter

for config in (LoRAConfig(r=2), DoRAConfig(r=2), LoRAFAConfig(r=2), VeRAConfig(r=2)):
    torch.manual_seed(0)
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "head", "tail"]
    model = nn.ModuleDict({name: nn.Linear(8, 6 + i) for i, name in enumerate(names)})
    inject(model, {"[!h]*a": config, "epsilon": replace(config, r=3)}, train=["head", "tail"])
    save_adapter(model, f"{sys.argv[1]}/{config.method}")
"""


def test_the_bytes_do_not_depend_on_the_order_of_hashes(tmp_path):
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-c", SAVE, tmp_path / seed], env=environment, check=True, timeout=120)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 8
