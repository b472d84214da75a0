"""The summary's counts against numbers that others published, on models built from their configs on the meta device.

A count is exact arithmetic (for each linear layer ``r (I + O)`` with LoRA, ``r (I + O) + O`` with DoRA, ``r + O`` with
VeRA), so every comparison here is an equality.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    DoRAConfig,
    LoRAConfig,
    NF4Config,
    VeRAConfig,
    inject,
    merge,
    quantize,
    summary,
)

transformers = pytest.importorskip("transformers")

LLAMA_MLP = ["gate_proj", "up_proj", "down_proj"]
LLAMA_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def roberta(size: str) -> nn.Module:
    wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **(wide if size == "large" else {})
    )
    return transformers.RobertaModel(config)


def deberta_v2_xxl() -> nn.Module:
    config = transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
    )
    return transformers.DebertaV2Model(config)


def llama(layers: int, width: int, inner: int, **settings) -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        **{"vocab_size": 32000, "num_attention_heads": width // 128, "head_dim": 128} | settings,
    )
    return transformers.LlamaForCausalLM(config)


def phi_1_5() -> nn.Module:
    config = transformers.PhiConfig(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32
    )
    return transformers.PhiForCausalLM(config)


def attention_stack(layers: int, width: int, v_out: int | None = None) -> nn.Module:
    """``layers`` blocks of four linear layers on a stream of ``width``; ``v_out`` is the width of keys and values."""
    out = {"q": width, "k": v_out or width, "v": v_out or width, "o": width}
    blocks = (nn.ModuleDict({name: nn.Linear(width, o, bias=False) for name, o in out.items()}) for _ in range(layers))
    return nn.ModuleList(blocks)


MODELS = {
    "roberta-base": lambda: roberta("base"),
    "roberta-large": lambda: roberta("large"),
    "deberta-v2-xxl": deberta_v2_xxl,
    "gpt-3": lambda: attention_stack(96, 12288),
    "llama-7b": lambda: llama(32, 4096, 11008),
    "llama-13b": lambda: llama(40, 5120, 13824),
    "llama-3.1-8b": lambda: llama(32, 4096, 14336, vocab_size=128256, num_key_value_heads=8),
    "llama-3.2-3b": lambda: llama(
        28, 3072, 8192, vocab_size=128256, num_key_value_heads=8, num_attention_heads=24, tie_word_embeddings=True
    ),
    "phi-1.5": phi_1_5,
    "stablelm-3b": lambda: attention_stack(16, 4096),
    # The model fuses q, k and v into one 8192 -> 9216 layer (8 key-value heads of 64). The published count is litgpt's,
    # which adapts the q rows (8192 -> 8192) and the v rows (8192 -> 512) apart: as if they were layers of their own.
    "falcon-40b": lambda: attention_stack(60, 8192, v_out=512),
}

BERT_QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]
PUBLISHED = [
    # LoRA (arXiv 2106.09685), table 2
    ("roberta-base", BERT_QV, 8, 294_912),
    ("roberta-large", BERT_QV, 8, 786_432),
    ("deberta-v2-xxl", ["query_proj", "value_proj"], 16, 4_718_592),
    # LoRA, tables 4, 5 and 15
    ("gpt-3", ["v"], 2, 4_718_592),
    ("gpt-3", ["q", "v"], 1, 4_718_592),
    ("gpt-3", ["q", "v"], 2, 9_437_184),
    ("gpt-3", ["q", "k", "v", "o"], 1, 9_437_184),
    ("gpt-3", ["q", "v"], 4, 18_874_368),
    ("gpt-3", ["q", "k", "v", "o"], 2, 18_874_368),
    ("gpt-3", ["q"], 8, 18_874_368),
    ("gpt-3", ["q", "v"], 8, 37_748_736),
    ("gpt-3", ["q", "k", "v", "o"], 4, 37_748_736),
    ("gpt-3", ["q", "v"], 64, 301_989_888),
    ("gpt-3", ["q", "k", "v", "o"], 64, 603_979_776),
    # VeRA (arXiv 2310.11454), table 1, its LoRA columns
    ("roberta-base", BERT_QV, 1, 36_864),
    ("roberta-base", BERT_QV, 16, 589_824),
    ("roberta-base", BERT_QV, 256, 9_437_184),
    ("roberta-large", BERT_QV, 1, 98_304),
    ("roberta-large", BERT_QV, 16, 1_572_864),
    ("roberta-large", BERT_QV, 256, 25_165_824),
    ("gpt-3", ["q", "v"], 16, 75_497_472),
    ("gpt-3", ["q", "v"], 256, 1_207_959_552),
    # VeRA, table 4 (the QLoRA setup)
    ("llama-7b", "all-linear", 64, 159_907_840),
    ("llama-13b", "all-linear", 64, 250_347_520),
    # tinker-cookbook's hyperparam_utils.py: parameters for each unit of rank
    ("llama-3.1-8b", LLAMA_MLP, 1, 1_769_472),
    ("llama-3.1-8b", LLAMA_ATTENTION, 1, 851_968),
    ("llama-3.1-8b", ["lm_head"], 1, 132_352),
    # PEFT's MetaMathQA benchmark
    ("llama-3.2-3b", LLAMA_QV, 32, 9_175_040),
    ("llama-3.2-3b", LLAMA_MLP, 10, 9_461_760),
    ("llama-3.2-3b", LLAMA_QV, 64, 18_350_080),
    # litgpt's resource tables
    ("llama-7b", LLAMA_QV, 8, 4_194_304),
    ("llama-13b", LLAMA_QV, 8, 6_553_600),
    ("phi-1.5", LLAMA_QV, 8, 1_572_864),
    ("stablelm-3b", ["q", "v"], 8, 2_097_152),
    ("falcon-40b", ["q", "v"], 8, 12_042_240),
]

TOTALS = {
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-3b": 3_212_749_824,
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_total_is_the_published_size_of_the_model(name, total):
    report = summary(on_meta(name))
    assert report.total == total
    assert report.layers == ()


@pytest.mark.parametrize(("name", "targets", "r", "trainable"), PUBLISHED)
def test_trainable_count_is_the_published_one(name, targets, r, trainable):
    model = on_meta(name)
    before = summary(model).total
    report = summary(inject(model, targets, LoRAConfig(r=r)))
    assert report.trainable == trainable
    assert report.frozen == before
    assert sum(layer.trainable for layer in report.layers) == trainable


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return llama(2, 64, 96, vocab_size=50, num_attention_heads=4, num_key_value_heads=2, head_dim=16).eval()


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_model_counts_the_weights_its_codes_stand_for(double_quant):
    model = inject(tiny_llama(), config=LoRAConfig(r=4))
    dense = summary(model)
    packed = summary(quantize(model, NF4Config(double_quant=double_quant)))
    assert (packed.total, packed.trainable, packed.frozen) == (dense.total, dense.trainable, dense.frozen)
    assert [x.trainable for x in packed.layers] == [x.trainable for x in dense.layers]
    assert [x.shape for x in packed.layers] == [x.shape for x in dense.layers]


def test_qlora_model_counts_biases_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    before = summary(model).total
    assert summary(quantize(inject(model, "0", LoRAConfig(r=2)))).frozen == before == 16 * 8 + 8 + 8 * 4 + 4


# ---- other methods


LLAMA_COMMONSENSE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "targets", "r", "trainable"),
    [
        # DoRA (arXiv 2402.09353), tables 1 and 15: 0.84% of LLaMA-7B with its adapters; 0.12, 0.22, 0.43, 1.65%
        ("llama-7b", LLAMA_COMMONSENSE, 32, 56_975_360),
        ("llama-7b", LLAMA_COMMONSENSE, 4, 7_888_896),
        ("llama-7b", LLAMA_COMMONSENSE, 8, 14_901_248),
        ("llama-7b", LLAMA_COMMONSENSE, 16, 28_925_952),
        ("llama-7b", LLAMA_COMMONSENSE, 64, 113_074_176),
        # PEFT's MetaMathQA benchmark
        ("llama-3.2-3b", LLAMA_QV, 32, 9_289_728),
    ],
)
def test_dora_counts_as_published(name, targets, r, trainable):
    report = summary(inject(on_meta(name), targets, DoRAConfig(r=r)))
    assert report.trainable == trainable
    assert {layer.method for layer in report.layers} == {"dora"}


@pytest.mark.parametrize(
    ("name", "targets", "r", "trainable"),
    [
        ("roberta-base", BERT_QV, 1, 18_456),
        ("roberta-base", BERT_QV, 16, 18_816),
        ("roberta-base", BERT_QV, 256, 24_576),
        ("roberta-base", BERT_QV, 1024, 43_008),
        ("roberta-large", BERT_QV, 256, 61_440),
        ("gpt-3", ["q", "v"], 1, 2_359_488),
    ],
)
def test_vera_counts_as_its_paper_says(name, targets, r, trainable):
    report = summary(inject(on_meta(name), targets, VeRAConfig(r=r)))
    assert report.trainable == trainable
    assert {layer.method for layer in report.layers} == {"vera"}


@pytest.mark.parametrize("packed", [False, True])
def test_vera_merges_into_the_same_function(packed):
    model, ids = tiny_llama(), torch.arange(12).reshape(2, 6)
    plain = model(input_ids=ids).logits
    inject(model, config=VeRAConfig(r=8))
    assert torch.equal(model(input_ids=ids).logits, plain)  # b = 0
    if packed:
        quantize(model)
    draw_vectors(model)
    adapted = model(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 0.1
    merged = merge(copy.deepcopy(model))(input_ids=ids).logits
    # float32, logits of size 1, products of at most 96 terms: some 1e-6 of rounding
    torch.testing.assert_close(merged, adapted, atol=2e-5, rtol=0)


def test_vera_trains_its_vectors_alone():
    model = inject(tiny_llama(), config=VeRAConfig(r=8))
    draw_vectors(model)
    model(input_ids=torch.arange(6).reshape(1, 6)).logits.square().mean().backward()
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {
        "vera_lambda_b",
        "vera_lambda_d",
    }


@torch.no_grad()
def draw_vectors(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
