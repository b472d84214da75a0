"""Embeddings and output heads in 8 bit: stored, trained over, merged and written as what they are."""

import copy

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    NF4Config,
    QuantizationError,
    activate,
    delete_adapter,
    export_merged,
    inject,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    summary,
)
from lightning_lora.quantization.int8 import Int8Linear
from lightning_lora.quantization.int8_embedding import Int8Embedding
from lightning_lora.quantization.nf4 import NF4Linear
from tests.conftest import randomize, relative_difference


class Model(nn.Module):
    """Tokens to logits, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64, padding_idx=0)
        self.block = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 96)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(x + self.block(x))


TOKENS = torch.randint(96, (3, 7), generator=torch.Generator().manual_seed(0))
TARGETS = {"none of them": "all-linear", "embedding": ["block.*", "embed"], "head": ["block.*", "head"]}
EVERY = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)


def base(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def packed(targets="all-linear", model: nn.Module | None = None, **settings) -> nn.Module:
    model = inject(base() if model is None else model, targets, LoRAConfig(r=4))
    return quantize(randomize(model, std=0.1), embeddings="int8", **settings)


def edges_of(model: nn.Module) -> list[nn.Module]:
    return [layer.base_layer if hasattr(layer, "base_layer") else layer for layer in (model.embed, model.head)]


@EVERY
def test_they_are_in_8_bit_and_the_rest_in_what_was_asked_for(targets):
    model = packed(targets)
    assert [type(edge) for edge in edges_of(model)] == [Int8Embedding, Int8Linear]
    assert isinstance(model.block[0].base_layer, NF4Linear)
    edges = edges_of(model)
    stored = sum(t.numel() * t.element_size() for edge in edges for t in edge.buffers())
    assert stored == 2 * (96 * 64 + 4 * 96)  # a byte each, and a float32 for each row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_bitsandbytes_and_comes_in_the_dtype_of_the_embedding(dtype):
    dense = base(dtype).embed
    codes, maxima, _ = bnb.int8_vectorwise_quant(dense.weight.detach().half())
    model = packed(model=base(dtype))
    assert torch.equal(model.embed.codes, codes)
    rows = bnb.int8_vectorwise_dequant(codes, maxima).to(dtype)
    assert torch.equal(model.embed(TOKENS), rows[TOKENS])
    assert torch.equal(model.embed.weight, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.embed(TOKENS).dtype == dense(TOKENS).dtype == dtype
    assert model.to(torch.bfloat16).embed(TOKENS).dtype == torch.bfloat16
    assert model.embed.padding_idx == 0


@EVERY
def test_merging_gives_the_trained_function_under_the_original_keys(targets):
    model = packed(targets)
    computed = model(TOKENS)
    found = merge(model)
    assert {key: tuple(t.shape) for key, t in found.state_dict().items()} == {
        key: tuple(t.shape) for key, t in base().state_dict().items()
    }
    assert found.embed.padding_idx == 0
    assert relative_difference(found(TOKENS), computed) <= 1e-5  # float32, another order of summation


@EVERY
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_writes_what_a_merge_makes_and_leaves_the_model(targets, dtype, tmp_path):
    model = packed(targets)
    before = model(TOKENS)
    export_merged(model, tmp_path, dtype=dtype)
    assert torch.equal(model(TOKENS), before)
    found, expected = load_file(tmp_path / "model.safetensors"), merge(model, dtype=dtype).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor.to(dtype or tensor.dtype)) for key, tensor in expected.items())


def test_gradients_pass_through_a_head_to_the_adapters_below_and_are_those_of_the_dense_one():
    model = packed(["block.*", "embed"])
    twin = copy.deepcopy(model)
    head = nn.Linear(64, 96)
    head.weight, head.bias = nn.Parameter(model.head.dequantize(torch.float32)), model.head.bias
    twin.head = head.requires_grad_(False)
    for each in (model, twin):
        each(TOKENS).square().sum().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=False):
        assert (ours.grad is None) == (expected.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, expected.grad)
    assert any(p.grad is not None for p in model.embed.parameters())


def test_an_adapter_folder_is_of_the_dense_base_and_loads_before_it_is_quantized_again(tmp_path):
    model = packed(["block.*", "embed", "head"])
    save_adapter(model, tmp_path)
    again = quantize(load_adapter(base(), tmp_path), embeddings="int8")
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_states_copies_and_a_model_with_parameters_are_the_same():
    model, other = packed("all-linear"), packed("all-linear", hold="parameters")
    expected = model(TOKENS)
    assert torch.equal(other(TOKENS), expected)
    assert torch.equal(copy.deepcopy(model)(TOKENS), expected)
    fresh = packed("all-linear")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(TOKENS), expected)


def test_the_summary_counts_the_weights_they_stand_for_and_the_bytes_they_take():
    dense, model = summary(base()), packed("all-linear")
    account = summary(model)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert account.total == dense.total + adapters
    assert account.model_bytes == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert [(x.name, x.storage) for x in account.unadapted] == [("embed", "int8/row"), ("head", "int8/row")]
    assert "int8/row" in str(account)


def test_an_adapter_can_come_later_and_go_again():
    model = packed("all-linear")
    before = model(TOKENS)
    inject(model, ["embed", "head"], LoRAConfig(r=2), name="late")
    delete_adapter(activate(model, "default"), "late")
    assert [type(edge) for edge in (model.embed, model.head)] == [Int8Embedding, Int8Linear]
    computed = model(TOKENS)
    assert torch.equal(computed, before)
    assert relative_difference(merge(model)(TOKENS), computed) <= 1e-5


def test_hooks_on_them_stay():
    model, seen = base(), []
    model.embed.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model = packed(model=model)
    model(TOKENS)
    merge(model)(TOKENS)
    assert seen == [(3, 7, 64)] * 2


def test_a_model_compiles_as_one_graph():
    model = packed(["block.*", "embed"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_difference(compiled(TOKENS), model(TOKENS)) <= 1e-6


def test_a_weight_that_embedding_and_head_share_is_refused_and_nothing_changes():
    model = base()
    model.head.weight = model.embed.weight
    inject(model, "block.*", LoRAConfig(r=4))
    with pytest.raises(QuantizationError, match=r"embed is one parameter with another \(embed.weight, head.weight\)"):
        quantize(model, embeddings="int8")
    assert isinstance(model.block[0].base_layer, nn.Linear)


def test_what_is_trained_whole_stays_and_so_does_what_is_not_asked_for():
    model = inject(base(), "block.*", LoRAConfig(r=4), train="head")
    quantize(model, NF4Config(), embeddings="int8")
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.embed, Int8Embedding)
    assert isinstance(quantize(inject(base(), "block.*")).embed, nn.Embedding)


def test_a_model_without_any_is_refused():
    model = inject(nn.Sequential(nn.Linear(64, 64)), "0", LoRAConfig(r=4))
    with pytest.raises(QuantizationError, match="has no embedding and no output head"):
        quantize(model, embeddings="int8")
    with pytest.raises(ValueError, match="embeddings must be None or one of int8, got 'nf4'"):
        quantize(model, embeddings="nf4")
