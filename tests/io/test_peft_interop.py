"""Adapter folders against the package whose format they are in: PEFT reads ours, we read PEFT's, with the same logits.

Over a dense base and over NF4, where PEFT runs on bitsandbytes' ``Linear4bit`` and we run on our own layer, made either
from the dense weight or from the very ``Linear4bit``. A and B are random everywhere, so that nothing passes by being 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    VeRAConfig,
    inject,
    load_adapter,
    quantize,
    save_adapter,
)
from lightning_lora.io.conversion import unpickle
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.adapted import AdaptedLayer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

# PEFT 0.21 asks a transformers 5 model for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# float32 logits of size about 1 after two or three layers; the sums run in another order, which costs some 1e-6
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
BASES = ["dense", "nf4", "adopted"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Plain(nn.Module):
    """A hand-written model in which the name of one layer is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.inner = nn.ModuleDict({"up": nn.Linear(32, 32, bias=False), "down": nn.Linear(32, 16)})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner["up"](self.up(x).tanh()).tanh()
        return self.head(self.norm(self.inner["down"](h) + x))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


@dataclass(frozen=True)
class Case:
    """A model, the layers to adapt, the modules to train whole, and what to feed it."""

    make: Callable[[], nn.Module]
    targets: Sequence[str]
    train: Sequence[str]
    inputs: Tensor

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        for parameter in model.parameters():  # Hugging Face starts so small that logits are near 0
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model.eval()(self.inputs)
        return out if isinstance(out, Tensor) else out.logits


IDS = torch.arange(2, 26).reshape(3, 8)
CASES = {
    "llama": Case(llama, ["q_proj", "v_proj", "down_proj"], [], IDS),
    "bert": Case(bert, ["query", "value", "attention.output.dense"], ["classifier"], IDS),
    "plain": Case(Plain, ["up", "down"], ["norm"], torch.randn(4, 16, generator=torch.Generator().manual_seed(3))),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@torch.no_grad()
def draw(model: nn.Module) -> nn.Module:
    """Give every trained tensor random values, as a training would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def linear4bit(layer: nn.Linear) -> nn.Module:
    """The layer as a model loaded in 4 bits has it, on the CPU."""
    packed = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    packed.load_state_dict(layer.state_dict())
    packed = packed.to("cpu").eval()
    packed.support_avx512bf16_for_cpu = False  # else an evaluation on such a processor rounds the weight further
    return packed


def in_4bit(model: nn.Module, targets: Sequence[str]) -> nn.Module:
    """Replace the targeted layers by ``Linear4bit`` and say so where PEFT looks."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear4bit(layer))
    model.is_loaded_in_4bit = True
    return model


def our_base(case: Case, base: str) -> nn.Module:
    return in_4bit(case.base(), case.targets) if base == "adopted" else case.base()


def their_base(case: Case, base: str) -> nn.Module:
    return case.base() if base == "dense" else in_4bit(case.base(), case.targets)


def ours(case: Case, config: LoRAConfig, base: str = "dense", targets: object = None) -> nn.Module:
    """Our model after a training."""
    model = inject(our_base(case, base), targets or case.targets, config, train=case.train)
    return draw(quantize(model) if base == "nf4" else model)


def theirs(case: Case, config: peft.LoraConfig, base: str = "dense") -> nn.Module:
    """PEFT's model after a training."""
    return draw(peft.get_peft_model(their_base(case, base), config))


def read_by_peft(case: Case, folder: os.PathLike, base: str = "dense") -> nn.Module:
    return peft.PeftModel.from_pretrained(their_base(case, base), str(folder))


def read_by_us(case: Case, folder: os.PathLike, base: str = "dense") -> nn.Module:
    model = load_adapter(our_base(case, base), folder)
    return quantize(model) if base == "nf4" else model


def peft_config(case: Case, **settings) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(case.targets)} | settings
    return peft.LoraConfig(modules_to_save=list(case.train) or None, **settings)


def assert_adapted(case: Case, logits: Tensor, base: str = "dense") -> None:
    """The adapter does something: far more than any tolerance here."""
    assert (logits - case.logits(their_base(case, base))).abs().max() > 0.1


def their_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


# ---- ours to PEFT


@pytest.mark.parametrize(("base", "scaling"), [*((base, "standard") for base in BASES), ("dense", "rslora")])
def test_peft_gives_our_logits_from_our_folder(case, base, scaling, tmp_path):
    model = ours(case, LoRAConfig(r=4, alpha=6, scaling=scaling), base)
    save_adapter(model, tmp_path)
    loaded = read_by_peft(case, tmp_path, base)
    assert_adapted(case, case.logits(model), base)
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


@pytest.mark.parametrize("base", ["nf4", "adopted"])
def test_peft_runs_our_folder_on_its_own_4bit_layer(case, base, tmp_path):
    save_adapter(ours(case, LoRAConfig(r=4), base), tmp_path)
    layers = their_layers(read_by_peft(case, tmp_path, base))
    assert {type(layer) for layer in layers} == {peft.tuners.lora.bnb.Linear4bit}
    assert len(layers) == len(adapted_layers(ours(case, LoRAConfig(r=4), base)))


@pytest.mark.parametrize("config", [DoRAConfig(r=4, alpha=6), VeRAConfig(r=8)], ids=["DoRA", "VeRA"])
@pytest.mark.parametrize("base", ["nf4", "adopted"])
def test_peft_gives_our_logits_over_4_bits_by_other_methods(base, config, tmp_path):
    case = CASES["llama"]
    model = ours(case, config, base)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(case.logits(read_by_peft(case, tmp_path, base)), case.logits(model), **CLOSE)


def test_peft_writes_back_the_tensors_we_wrote(case, tmp_path):
    save_adapter(ours(case, LoRAConfig(r=4)), tmp_path / "ours")
    read_by_peft(case, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def mixed(case: Case) -> dict[str, LoRAConfig]:
    """Another rank and alpha for each target; for the plain model a target that is the end of another one's name."""
    ranks = {target: LoRAConfig(r=2 + 2 * i, alpha=5 + 4 * i) for i, target in enumerate(case.targets)}
    return ranks | ({"inner.up": LoRAConfig(r=3, alpha=20)} if case.make is Plain else {})


@pytest.mark.parametrize("base", BASES)
def test_peft_reads_our_ranks_by_target(case, base, tmp_path):
    model = ours(case, LoRAConfig(), base, targets=mixed(case))
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["rank_pattern"]
    assert settings["alpha_pattern"]
    torch.testing.assert_close(case.logits(read_by_peft(case, tmp_path, base)), case.logits(model), **CLOSE)


@pytest.mark.parametrize("r", [4, 2])
def test_peft_does_not_take_the_setting_of_one_layer_for_another_that_ends_alike(r, tmp_path):
    case = CASES["plain"]
    model = ours(case, LoRAConfig(), targets={"up": LoRAConfig(r=r, alpha=20), "inner.*": LoRAConfig(r=4, alpha=3)})
    save_adapter(model, tmp_path)
    torch.testing.assert_close(case.logits(read_by_peft(case, tmp_path)), case.logits(model), **CLOSE)
    torch.testing.assert_close(case.logits(read_by_us(case, tmp_path)), case.logits(model), rtol=0, atol=0)


def test_peft_adapts_exactly_our_layers_when_a_bare_name_would_match_more(tmp_path):
    case = CASES["plain"]
    model = draw(inject(case.base(), "up", LoRAConfig(r=4), exclude="inner.up"))
    save_adapter(model, tmp_path)
    loaded = read_by_peft(case, tmp_path)
    assert len(their_layers(loaded)) == 1
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)
    torch.testing.assert_close(case.logits(load_adapter(case.base(), tmp_path)), case.logits(model), rtol=0, atol=0)


def test_peft_adapts_exactly_our_layers_of_all_linear(case, tmp_path):
    model = draw(inject(case.base(), config=LoRAConfig(r=2), train=case.train))
    save_adapter(model, tmp_path)
    loaded = read_by_peft(case, tmp_path)
    assert len(their_layers(loaded)) == len(adapted_layers(model))
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_peft_reads_our_dropout(tmp_path):
    save_adapter(ours(CASES["llama"], LoRAConfig(r=4, dropout=0.25)), tmp_path)
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).lora_dropout == 0.25


def test_peft_reads_our_classifier_as_a_module_to_save(tmp_path):
    case = CASES["bert"]
    model = ours(case, LoRAConfig(r=4))
    save_adapter(model, tmp_path)
    loaded = read_by_peft(case, tmp_path)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, model.classifier.weight)
    assert not torch.equal(model.classifier.weight, case.base().classifier.weight)


def test_peft_reads_modules_trained_whole_deep_in_the_model(tmp_path):
    case = CASES["llama"]
    model = draw(inject(case.base(), "q_proj", LoRAConfig(r=4), train=["embed_tokens", "lm_head"]))
    save_adapter(model, tmp_path)
    torch.testing.assert_close(case.logits(read_by_peft(case, tmp_path)), case.logits(model), **CLOSE)
    torch.testing.assert_close(case.logits(read_by_us(case, tmp_path)), case.logits(model), rtol=0, atol=0)


# ---- PEFT's to us


@pytest.mark.parametrize(("base", "use_rslora"), [*((base, False) for base in BASES), ("dense", True)])
def test_we_give_pefts_logits_from_its_folder(case, base, use_rslora, tmp_path):
    model = theirs(case, peft_config(case, use_rslora=use_rslora), base)
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path, base)
    assert_adapted(case, case.logits(model), base)
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_pefts_folder_loads_into_an_injected_and_quantized_model(case, tmp_path):
    model = theirs(case, peft_config(case), "nf4")
    model.save_pretrained(tmp_path)
    loaded = inject(case.base(), case.targets, LoRAConfig(r=4, alpha=6), train=case.train)
    load_adapter(quantize(loaded), tmp_path)
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_we_write_back_the_tensors_peft_wrote(case, tmp_path):
    theirs(case, peft_config(case)).save_pretrained(tmp_path / "theirs")
    save_adapter(read_by_us(case, tmp_path / "theirs"), tmp_path / "ours")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("base", BASES)
def test_we_read_pefts_ranks_by_target(case, base, tmp_path):
    patterns = mixed(case)
    ranks = {name: config.r for name, config in reversed(patterns.items())}  # PEFT takes the first match, we the last
    alphas = {name: config.alpha for name, config in reversed(patterns.items())}
    model = theirs(case, peft_config(case, rank_pattern=ranks, alpha_pattern=alphas), base)
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path, base)
    assert {layer.adapter("default").config.r for layer in adapted_layers(loaded).values()} == set(ranks.values())
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


@pytest.mark.parametrize(
    "key",
    ["model.layers.1.self_attn.q_proj", r"^model\.layers\.1\.self_attn\.q_proj", "layers.1.self_attn.q_proj"],
)
def test_we_read_a_rank_of_one_layer(key, tmp_path):
    case = CASES["llama"]
    model = theirs(case, peft_config(case, rank_pattern={key: 7}, alpha_pattern={key: 3}))
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path)
    ranks = {path: layer.adapter("default").config.r for path, layer in adapted_layers(loaded).items()}
    assert [path for path, r in ranks.items() if r == 7] == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_an_expression_among_pefts_patterns_is_refused_and_never_run(tmp_path):
    case = CASES["llama"]
    key = r"layers\.(0|1)\.self_attn\.q_proj"
    theirs(case, peft_config(case, rank_pattern={key: 7})).save_pretrained(tmp_path)
    loaded = case.base()
    with pytest.raises(AdapterError, match="rank_pattern has the expression"):
        load_adapter(loaded, tmp_path)
    assert not adapted_layers(loaded)


def test_we_read_pefts_targets_given_as_an_expression(tmp_path):
    case = CASES["llama"]
    model = theirs(case, peft_config(case, target_modules=r".*\.1\.self_attn\.(q|k)_proj"))
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path)
    assert set(adapted_layers(loaded)) == {f"model.layers.1.self_attn.{name}_proj" for name in "qk"}
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_we_read_pefts_all_linear(case, tmp_path):
    # PEFT's own rule for the head knows transformers' classes only; name the plain model's outright
    excluded = ["head"] if case.make is Plain else None
    model = theirs(case, peft_config(case, target_modules="all-linear", exclude_modules=excluded))
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path)
    assert len(adapted_layers(loaded)) == len(their_layers(model))
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_we_read_pefts_dropout(tmp_path):
    case = CASES["llama"]
    theirs(case, peft_config(case, lora_dropout=0.25)).save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path)
    assert {layer.adapter("default").config.dropout for layer in adapted_layers(loaded).values()} == {0.25}


def test_we_read_a_sequence_classifier_of_pefts_task_type(tmp_path):
    # For this task PEFT names "classifier" and "score" in modules_to_save, whichever of them the model has.
    case = CASES["bert"]
    model = theirs(case, peft.LoraConfig(r=4, target_modules=list(case.targets), task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) == {"classifier", "score"}
    loaded = read_by_us(case, tmp_path)
    assert not torch.equal(loaded.classifier.weight, case.base().classifier.weight)
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_we_read_a_module_to_save_that_peft_names_by_its_last_part(tmp_path):
    # PEFT matches modules_to_save by the end of a name: "embed_tokens" is model.embed_tokens.
    case = CASES["llama"]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = theirs(case, settings)
    model.save_pretrained(tmp_path)
    loaded = read_by_us(case, tmp_path)
    assert loaded.model.embed_tokens.weight.requires_grad
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


def test_we_read_an_adapter_of_another_name(tmp_path):
    case = CASES["llama"]
    model = draw(peft.get_peft_model(case.base(), peft_config(case), adapter_name="poet"))
    model.save_pretrained(tmp_path)
    loaded = load_adapter(case.base(), tmp_path / "poet", name="poet")
    torch.testing.assert_close(case.logits(loaded), case.logits(model), **CLOSE)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(settings, word, tmp_path):
    case = CASES["bert"]
    theirs(case, peft_config(case, **settings)).save_pretrained(tmp_path)
    loaded = case.base()
    with pytest.raises(AdapterError, match=word):
        load_adapter(loaded, tmp_path)
    assert not any(isinstance(module, AdaptedLayer) for module in loaded.modules())


def test_another_method_of_peft_is_refused_by_name(tmp_path):
    case = CASES["llama"]
    draw(peft.get_peft_model(case.base(), peft.LoHaConfig(r=4, target_modules=["q_proj"]))).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="peft_type is 'LOHA'"):
        load_adapter(case.base(), tmp_path)


def test_a_pickle_by_peft_is_refused_and_the_way_to_convert_it_works(tmp_path):
    case = CASES["llama"]
    model = theirs(case, peft_config(case))
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(AdapterError, match="lightning-lora convert"):
        load_adapter(case.base(), tmp_path)
    unpickle(tmp_path, tmp_path)
    torch.testing.assert_close(case.logits(read_by_us(case, tmp_path)), case.logits(model), **CLOSE)


# ---- the same bytes


def contents(folder: os.PathLike) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def assert_same_tensors(one: os.PathLike, other: os.PathLike) -> None:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("base", BASES)
def test_a_second_save_writes_the_same_bytes(case, base, tmp_path):
    model = ours(case, LoRAConfig(), base, targets=mixed(case))
    save_adapter(model, tmp_path / "first")
    save_adapter(model, tmp_path / "second")
    save_adapter(load_adapter(our_base(case, base), tmp_path / "first"), tmp_path / "third")
    assert list(contents(tmp_path / "first")) == [CONFIG, WEIGHTS]
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    if base != "nf4":  # the third was loaded over a dense base, which the header tells
        assert contents(tmp_path / "first") == contents(tmp_path / "third")
