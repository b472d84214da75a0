"""A base goes from files to its packed form as if it had been loaded and then quantized."""

from __future__ import annotations

import copy

import bitsandbytes  # noqa: F401 (its import warns, and a test here wants one warning)
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_lora as ll
from lightning_lora import (
    FP4Config,
    Int8Config,
    LoadError,
    LoRAConfig,
    NF2Config,
    NF3Config,
    NF4Config,
    QuantizationError,
    TargetError,
    inject,
    load_base,
    merge,
    parameters_on_meta,
)
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.nn.fingerprint import fingerprints
from lightning_lora.quantization.nf4 import NF4Linear
from lightning_lora.quantization.nf4_stack import NF4Stack
from tests.conftest import Net, randomize
from tests.loading.folders import assert_same_base, load_then_quantize, same_bits, untouched, written

CONFIGS = [NF4Config(), NF4Config(block_size=128, double_quant=False), FP4Config(), NF3Config(), Int8Config()]


def hollow(kind=Net, *arguments) -> nn.Module:
    with parameters_on_meta():
        return kind(*arguments)


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.storage.replace("/", "-"))
def test_the_model_is_the_one_that_loading_and_then_quantizing_makes_bit_for_bit(config, shards, net, tmp_path, tokens):
    folder = written(tmp_path, net.bfloat16().state_dict(), shards)
    found = load_base(hollow(), folder, quantization=config)
    assert packed_names(found) == {name for name, module in net.named_modules() if type(module) is nn.Linear} - {"head"}
    inject(found, config=LoRAConfig(r=1))
    expected = load_then_quantize(net, config=config)
    assert_same_base(found, expected)
    assert torch.equal(found(tokens), expected(tokens))


@pytest.mark.filterwarnings("ignore:quantization='nf2' loses")
def test_nf2_warns_that_no_adapter_can_start_from_what_is_lost(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    with pytest.warns(UserWarning, match=r"'nf2' loses 57%.*before adapters could start"):
        found = load_base(hollow(), folder, quantization=NF2Config())
    assert_same_base(inject(found, config=LoRAConfig(r=1)), load_then_quantize(net, config=NF2Config()))


def test_without_a_storage_everything_is_loaded_dense(net, tmp_path):
    found = load_base(hollow(), written(tmp_path, net.state_dict()), quantization=None)
    assert all(same_bits(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_one_file_may_be_named_itself(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "other.safetensors")
    found = load_base(hollow(), tmp_path / "other.safetensors", quantization=None)
    assert torch.equal(found.head.weight, net.head.weight)


def test_targets_and_exclude_choose_what_is_quantized(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    found = load_base(hollow(), folder, targets={"*_proj": LoRAConfig(), "head": LoRAConfig()}, exclude="blocks.1.*")
    assert packed_names(found) == {"blocks.0.q_proj", "blocks.0.up_proj", "head"}


def test_a_dtype_is_for_what_stays_dense_and_for_what_is_merged(net, tmp_path):
    """Weights are packed from what is in the files: float32 here, as if the model were cast after it was quantized."""
    folder = written(tmp_path, net.state_dict())
    found = inject(load_base(hollow(), folder, dtype=torch.bfloat16), config=LoRAConfig(r=1))
    assert found.embed.weight.dtype is found.blocks[0]["up_proj"].base_layer.bias.dtype is torch.bfloat16
    expected = load_then_quantize(net, config=NF4Config())
    assert torch.equal(found.downs[0].base_layer.codes, expected.downs[0].base_layer.codes)
    assert merge(found).downs[0].weight.dtype is torch.bfloat16


def test_what_training_needs_of_parameters_is_kept(net, tmp_path):
    model = hollow()
    model.norm.weight.requires_grad_(False)
    model.norm.bias._no_weight_decay = True
    load_base(model, written(tmp_path, net.state_dict()))
    assert not model.norm.weight.requires_grad
    assert model.norm.bias.requires_grad
    assert model.norm.bias._no_weight_decay
    assert not model.blocks[0]["up_proj"].bias.requires_grad


def test_hooks_move_to_the_packed_layer(net, tmp_path, tokens):
    model, seen = hollow(), []
    model.downs[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    load_base(model, written(tmp_path, net.state_dict()))(tokens)
    assert seen == [NF4Linear]


def test_nothing_is_drawn(net, tmp_path):
    folder, model = written(tmp_path, net.state_dict()), hollow()
    before = torch.get_rng_state()
    load_base(model, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_does_not_belong_to_the_file(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    found = load_base(hollow(), folder)
    file = folder / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)  # in place: a map would change with it
    assert torch.equal(found.head.weight, net.head.weight)


def test_large_models_are_fingerprinted_by_a_sample_as_when_they_are_quantized(net, tmp_path, monkeypatch):
    """Whether all bytes are hashed depends on the size of all that is quantized, here 5 MiB."""
    wide = Net(width=512, depth=1)
    folder = written(tmp_path, wide.state_dict())
    for limit in (2**23, 2**22):
        monkeypatch.setattr("lightning_lora.nn.fingerprint.WHOLE_UP_TO", limit)
        monkeypatch.setattr("lightning_lora.loading.load_base.WHOLE_UP_TO", limit)
        found = load_base(hollow(Net, 512, 1), folder)
        known = fingerprints({name: wide.get_submodule(name).weight for name in packed_names(found)})
        assert {name: found.get_submodule(name).origin.weight for name in known} == known
        assert {origin.whole is None for origin in known.values()} == ({False} if limit == 2**23 else {True, False})


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_one_name_of_a_tied_weight_is_enough_and_it_stays_tied(name, tmp_path):
    state = Tied().state_dict()
    folder = written(tmp_path, {key: value for key, value in state.items() if key.startswith("inner") or key == name})
    found = load_base(hollow(Tied), folder)
    assert found.head.weight is found.embed.weight
    assert torch.equal(found.head.weight, state[name])


def test_both_names_of_a_tied_weight_have_to_say_the_same(tmp_path):
    load_base(hollow(Tied), written(tmp_path, Tied().state_dict()))
    folder, model = written(tmp_path, Tied(tie=False).state_dict()), hollow(Tied)
    with pytest.raises(
        LoadError, match=r"ties what the files call embed.weight, head.weight, and head.weight has other"
    ):
        load_base(model, folder)
    assert untouched(model)
    found = load_base(model, folder, rename={"head.weight": None})
    assert found.head.weight is found.embed.weight


def test_a_tied_weight_is_not_quantized(tmp_path):
    with pytest.raises(TargetError, match="head shares its weight"):
        load_base(hollow(Tied), written(tmp_path, Tied().state_dict()), targets=["head", "inner"])


def test_a_module_in_two_places_is_replaced_in_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(8, 8)

    folder = written(tmp_path, {f"b.{name}": value for name, value in nn.Linear(8, 8).state_dict().items()})
    found = load_base(hollow(Twice), folder, targets="a")
    assert found.a is found.b
    assert isinstance(found.a, NF4Linear)


class Attending(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **settings)
        self.out = nn.Linear(16, 4)


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 8, "vdim": 12, "add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("targets", ["attention.*", ["k_proj", "out_proj"]], ids=str)
def test_an_attention_is_taken_apart_and_its_projections_packed(settings, targets, tmp_path):
    torch.manual_seed(0)
    source = Attending(**settings)
    folder = written(tmp_path, source.state_dict())
    found = load_base(hollow(lambda: Attending(**settings)), folder, targets=targets)
    assert packed_names(found)
    assert_same_base(inject(found, targets, LoRAConfig(r=1)), load_then_quantize(source, targets, NF4Config()))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8))
        self.down = nn.Parameter(torch.randn(4, 8, 6))
        self.register_buffer("seen", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,eij,nj->no", self.down, self.up, x) * self.seen.sum()


def test_stacks_of_experts_are_packed_where_they_are_named(tmp_path):
    source = nn.Sequential(nn.Linear(8, 8), Experts())
    folder = written(tmp_path, source.state_dict())
    targets, x = ["1.up"], torch.randn(3, 8)
    found = load_base(hollow(lambda: nn.Sequential(nn.Linear(8, 8), Experts())), folder, targets=targets)
    assert [type(module) for module in found.modules() if isinstance(module, QuantizedLinear)] == [NF4Stack]
    expected = load_then_quantize(source, targets, NF4Config())
    assert torch.equal(found(x), expected(x))
    assert_same_base(inject(found, targets, LoRAConfig(r=1)), expected)


def test_adapters_train_over_it_and_merge(net, tmp_path, tokens):
    found = randomize(inject(load_base(hollow(), written(tmp_path, net.state_dict())), config=LoRAConfig(r=2)))
    found(tokens).square().mean().backward()
    adapted = found(tokens)
    assert merge(found).state_dict().keys() == net.state_dict().keys()
    assert torch.allclose(found(tokens), adapted, atol=1e-5)  # float32, values near 1: another order of summation


def test_a_layer_the_format_cannot_hold_stays_dense_and_is_named(tmp_path, caplog):
    def odd() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    found = load_base(hollow(odd), written(tmp_path, odd().state_dict()))
    assert packed_names(found) == {"1"}
    assert "not quantized: 0 (in_features=7 is odd" in caplog.text
    with pytest.raises(QuantizationError, match=r"none of the 1 .* in_features=7 is odd"):
        load_base(hollow(odd), tmp_path, targets="0")


def test_a_weight_too_large_for_int8_stays_dense_and_is_named(net, tmp_path, caplog):
    with torch.no_grad():
        net.downs[0].weight[0, 0] = 1e5
    folder = written(tmp_path, net.state_dict())
    found = load_base(hollow(), folder, quantization="int8")
    assert torch.equal(found.downs[0].weight, net.downs[0].weight)
    assert "downs.0 (its weight has values beyond 65504" in caplog.text
    assert_same_base(inject(found, config=LoRAConfig(r=1)), load_then_quantize(net, config=Int8Config()))
    with pytest.raises(QuantizationError, match="none of the 1 layers"):
        load_base(hollow(), folder, targets="downs.0", quantization="int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_the_model_stays_as_it_was(bad, net, tmp_path):
    with torch.no_grad():
        net.downs[1].weight[3, 4] = bad
    model = hollow()
    with pytest.raises(QuantizationError, match=r"base weight of downs\.1 holds NaN or infinity"):
        load_base(model, written(tmp_path, net.state_dict()))
    assert untouched(model)
    assert packed_names(model) == set()


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_the_model_stays_as_it_was(net, tmp_path, monkeypatch):
    folder, model = written(tmp_path, net.state_dict(), shards=2), hollow()
    from lightning_lora.io.base_files import BaseFiles

    read, shard = BaseFiles.read, folder / "model-00002-of-00002.safetensors"

    def shrinking(files, name):
        shard.write_bytes(shard.read_bytes()[:1000])
        return read(files, name)

    monkeypatch.setattr(BaseFiles, "read", shrinking)
    with pytest.raises(LoadError, match="cannot be read any more"):
        load_base(model, folder)
    assert untouched(model)


def test_what_is_not_a_plain_model_is_refused(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    loaded = load_base(hollow(), folder)
    with pytest.raises(LoadError, match=r"blocks\.0\.q_proj, .* is adapted or quantized already"):
        load_base(loaded, folder)
    with pytest.raises(LoadError, match="before inject"):
        load_base(inject(hollow(), config=LoRAConfig(r=1)), folder)
    with pytest.raises(TargetError, match="lazy"):
        load_base(nn.Sequential(nn.LazyLinear(4)), folder)
    with pytest.raises(TargetError, match="cannot replace itself"):
        load_base(hollow(nn.Linear, 4, 4), written(tmp_path / "l", nn.Linear(4, 4).state_dict()), targets="*")


def test_files_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        load_base(hollow(), tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LoadError, match="is a pickle, which is not read"):
        load_base(hollow(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 20)
    with pytest.raises(LoadError, match="truncated or no safetensors file"):
        load_base(hollow(), tmp_path)


def test_loading_to_the_meta_device_is_refused(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    with torch.device("meta"), pytest.raises(ValueError, match="after the block"):
        load_base(Net(), folder)
    with pytest.raises(ValueError, match="must be one of nf4, fp4"):
        load_base(hollow(), folder, quantization="nf5")
    with torch.device("meta"):
        found = load_base(Net(), folder, device="cpu")
    assert not any(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])


def test_a_model_that_holds_weights_gets_new_ones(net, tmp_path):
    folder = written(tmp_path, net.state_dict())
    found = load_base(Net(), folder)
    assert torch.equal(found.head.weight, net.head.weight)


def test_a_copy_and_a_pickle_keep_the_origin(net, tmp_path):
    found = load_base(hollow(), written(tmp_path, net.state_dict()))
    assert copy.deepcopy(found).downs[0].origin == found.downs[0].origin is not None


def test_transformers_models_are_loaded_as_they_are_saved(tmp_path):
    """Tied, without a value of ``lm_head`` in the files, and rotary frequencies that are in none."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True, dtype="bfloat16")
    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(config).bfloat16()
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    load_then_quantize(expected, config=NF4Config())
    tokens = torch.arange(12).view(2, 6)
    for context in (parameters_on_meta(), torch.device("meta")):
        with context:
            found = transformers.LlamaForCausalLM(config)
        inject(load_base(found, tmp_path), config=LoRAConfig(r=1))
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert_same_base(found, expected)
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_model_is_the_one_that_loading_and_then_quantizing_makes(net, tmp_path):
    folder = written(tmp_path, net.bfloat16().state_dict(), 2)
    found = inject(load_base(hollow(), folder, device="cuda"), config=LoRAConfig(r=1))
    expected = ll.quantize(inject(net.cuda(), config=LoRAConfig(r=1)))
    assert_same_base(found, expected)
