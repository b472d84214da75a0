"""The merged export: what merge and save would give, streamed, complete or absent, the live model untouched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import (
    AdapterError,
    DoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    MergeError,
    VeRAConfig,
    delete_adapter,
    export_merged,
    inject,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.io import export
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.sizes import as_bytes
from lightning_lora.nn import pieces
from tests.conftest import Net, randomize
from tests.io.files import assert_equal, read


def adapted(*, quantized: bool = False, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(inject(Net().to(dtype), **settings))
    return quantize(model) if quantized else model


@pytest.mark.parametrize("size", ["5GB", "40KB", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_the_files_hold_the_state_dict_of_the_merged_model(quantized, dtype, size, tmp_path):
    model = adapted(quantized=quantized, dtype=dtype, train="head")
    export_merged(model, tmp_path, max_shard_size=size)
    assert_equal(read(tmp_path), merge(model).state_dict())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Embedding(7, 8), nn.Linear(5, 3, bias=False)])
def test_every_kind_of_layer_and_integer_buffers_are_written(layer, tmp_path):
    model = nn.Sequential(nn.Sequential(layer), nn.BatchNorm2d(6))
    randomize(inject(model, "0.0", LoRAConfig(r=2)))
    export_merged(model, tmp_path)
    assert_equal(read(tmp_path), merge(model).state_dict())


@pytest.mark.parametrize("quantized", [False, True])
def test_the_live_model_is_left_as_it_is(quantized, tmp_path):
    model = adapted(quantized=quantized)
    modules, state = dict(model.named_modules()), {key: value.clone() for key, value in model.state_dict().items()}
    needs = [p.requires_grad for p in model.parameters()]
    export_merged(model, tmp_path)
    assert dict(model.named_modules()) == modules
    assert_equal(model.state_dict(), state)
    assert [p.requires_grad for p in model.parameters()] == needs


def test_another_dtype_is_that_of_all_floating_point_tensors(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6))
    randomize(inject(model, "0.0", LoRAConfig(r=2)))
    export_merged(model, tmp_path, dtype=torch.bfloat16)
    found = read(tmp_path)
    expected = merge(model).to(torch.bfloat16).state_dict()
    assert_equal(found, expected)


def test_shards_keep_to_the_size_and_the_index_finds_every_tensor(tmp_path):
    model = adapted()
    export_merged(model, tmp_path, max_shard_size=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for number, shard in enumerate(shards, start=1):
        assert shard.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with safe_open(shard, "pt") as file:
            assert all(index["weight_map"][key] == shard.name for key in file.keys())  # noqa: SIM118
    expected = merge(model).state_dict()
    assert sorted(index["weight_map"]) == sorted(expected)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())


@pytest.mark.parametrize(("first", "second"), [("40KB", "5GB"), ("5GB", "40KB"), ("40KB", "80KB"), ("40KB", "40KB")])
def test_a_second_export_leaves_nothing_of_the_first(first, second, tmp_path):
    export_merged(adapted(), tmp_path, max_shard_size=first)
    model = randomize(adapted(), std=0.1)
    export_merged(model, tmp_path, max_shard_size=second)
    assert_equal(read(tmp_path), merge(model).state_dict())
    assert (tmp_path / "model.safetensors.index.json").exists() == (second != "5GB")
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


def test_a_weight_under_two_names_is_written_under_each(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.blocks = self.net.blocks  # one layer, two names
            self.net.head = nn.Linear(64, 16, bias=False)
            self.net.head.weight = self.net.embed.weight  # two layers, one weight

    model = randomize(inject(Twice()))
    export_merged(model, tmp_path)
    assert_equal(read(tmp_path), merge(model).state_dict())


def test_a_compiled_layer_is_written_under_the_name_of_the_plain_one(tmp_path):
    model = adapted()
    export_merged(model, tmp_path / "plain")
    model.blocks = torch.compile(model.blocks, backend="eager")
    export_merged(model, tmp_path / "compiled")
    assert_equal(read(tmp_path / "compiled"), read(tmp_path / "plain"))


def test_nan_is_found_before_anything_is_replaced(tmp_path):
    good = adapted()
    export_merged(good, tmp_path)
    bad = adapted()
    bad.downs[1].adapter("default").lora_A.data[0, 0] = float("nan")
    for size in ("5GB", "40KB"):
        with pytest.raises(MergeError, match=r"NaN or infinity in downs\.1\.weight"):
            export_merged(bad, tmp_path, max_shard_size=size)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_equal(read(tmp_path), merge(good).state_dict())


def test_an_overflow_of_the_dtype_asked_for_is_found(tmp_path):
    model = adapted()
    model.downs[1].adapter("default").lora_B.data[0, 0] = 1e6
    with pytest.raises(MergeError, match=r"downs\.1.*dtype=torch\.float32"):
        export_merged(model, tmp_path, dtype=torch.float16)
    export_merged(model, tmp_path)


def test_a_folder_that_holds_an_adapter_is_refused(tmp_path):
    """transformers loads an adapter that lies beside merged weights on top of them."""
    model = adapted()
    save_adapter(model, tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(MergeError, match="add the update twice"):
        export_merged(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapters"):
        export_merged(Net(), tmp_path)


def test_quantized_layers_without_an_adapter_are_refused(tmp_path):
    model = adapted(quantized=True)
    model.norm = next(iter(adapted_layers(model).values())).base_layer
    model.blocks[0] = nn.ModuleDict()
    with pytest.raises(MergeError, match="norm is quantized and has no adapter"):
        export_merged(model, tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    good = adapted()
    export_merged(good, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(
            OSError, match=r"large; the model was not written, and what was there .* Check the disk"
        ) as found:
            export_merged(randomize(adapted(), std=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_equal(read(tmp_path), merge(good).state_dict())


@pytest.mark.parametrize(
    ("words", "size"), [("5GB", 5 * 10**9), ("1.5 kB", 1500), ("2GiB", 2**31), (7, 7), ("7", 7), ("100b", 100)]
)
def test_sizes_are_read_as_people_write_them(words, size):
    assert as_bytes("max_shard_size", words) == size


@pytest.mark.parametrize("words", ["", "5XB", "-1", 0, "GB", "0MB"])
def test_other_sizes_are_refused(words):
    with pytest.raises(ValueError, match=r"^max_shard_size=.* is no size"):
        as_bytes("max_shard_size", words)


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("quantized", [False, True])
def test_transformers_loads_the_export_and_gives_the_adapted_logits(quantized, size, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=quantized,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    plain = model(torch.arange(12)[None]).logits
    randomize(inject(model))
    if quantized:
        quantize(model)
    adapted_logits = model(torch.arange(12)[None]).logits
    export_merged(model, tmp_path, max_shard_size=size)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = loaded(torch.arange(12)[None]).logits
    # the order of summation alone differs: x(W + BA) against xW + xAB, in float32
    assert (logits - adapted_logits).abs().max() <= 1e-5 * adapted_logits.abs().max()
    assert (plain - adapted_logits).abs().max() > 0.1 * adapted_logits.abs().max()


METHODS = {
    "lora": LoRAConfig(r=4),
    "dora": DoRAConfig(r=4),
    "lora_fa": LoRAFAConfig(r=4),
    "vera": VeRAConfig(r=4),
    "pissa": LoRAConfig(r=4, init="pissa"),
    "loftq": LoRAConfig(r=4, init="loftq"),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_every_method_and_start_is_written_as_it_merges_on_attention_too(config, quantized, dtype, tmp_path):
    if config.starts_from == "quantization" and not quantized:
        pytest.skip("loftq starts where the base is quantized")
    model = nn.ModuleDict({"enc": nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), "out": nn.Linear(64, 64)})
    inject(model, ["enc.self_attn.*_proj", "enc.linear1"], config)
    if quantized:
        quantize(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)  # a start is a place to go from
    export_merged(model, tmp_path, dtype=dtype)
    merged = merge(model, dtype=dtype).state_dict()
    found = read(tmp_path)
    assert "enc.self_attn.in_proj_weight" in found
    assert_equal(found, {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in merged.items()})


def test_a_quantized_attention_that_has_lost_its_adapters_is_refused(tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4), "out": nn.Linear(64, 64)})
    quantize(inject(model, "attn.q_proj", LoRAConfig(r=2)))
    inject(model, "out", LoRAConfig(r=2), name="other")
    delete_adapter(model, "default")
    with pytest.raises(MergeError, match=r"attn\.q_proj.* is quantized and has no adapter"):
        export_merged(model, tmp_path)


def test_shards_written_over_shards_never_take_the_names_in_use(tmp_path):
    for number in range(3):
        model = randomize(adapted(), std=0.1 + number)
        export_merged(model, tmp_path, max_shard_size="40KB")
        names = {path.name for path in tmp_path.glob("*.safetensors")}
        assert all(name.startswith("model-b-" if number % 2 else "model-0") for name in names)
        assert_equal(read(tmp_path), merge(model).state_dict())


class Tracked(TorchDispatchMode):
    """Counts the bytes of all tensors made within the context that are still alive, and keeps the most there were."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in before.state_dict().values()}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


def peak_of_an_export(model: nn.Module, folder: Path, size: str = "5GB") -> int:
    with Tracked(model) as tracked:
        export_merged(model, folder, max_shard_size=size)
    return tracked.peak


@pytest.mark.parametrize("size", ["5GB", "2MB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LoRAConfig(r=2), LoRAFAConfig(r=2)])
@pytest.mark.parametrize("quantized", [False, True])
def test_an_export_holds_a_few_rows_of_a_layer_and_no_more(quantized, config, dtype, size, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_ELEMENTS", 1)  # 64 rows at a time
    monkeypatch.setattr(export, "_AT_ONCE", 1)  # each thread holds as much
    model = randomize(inject(Net(width=512, depth=2).to(dtype), config=config))
    if quantized:
        quantize(model)
    rows = 64 * 1024 * 4
    # Summed in float32, and as they are stored; the next are made while the last are held. 64 KB are for what is small.
    assert rows < peak_of_an_export(model, tmp_path, size) <= 3 * rows + 2**16 < 512 * 1024 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_rows_do_not_merge_alone_each_thread_of_an_export_holds_a_layer(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_AT_ONCE", 1)
    model = quantize(randomize(inject(Net(width=256, depth=3).to(dtype), config=DoRAConfig(r=2))))
    whole = 256 * 512 * 4
    # DoRA holds the weight and its sum with the update in float32, and then the sum times the magnitudes.
    assert 3 * whole <= peak_of_an_export(model, tmp_path) <= 3 * whole + 2**16


@pytest.mark.parametrize("quantized", [False, True])
def test_threads_that_export_several_layers_at_a_time_write_the_same_bytes(quantized, tmp_path, monkeypatch):
    model = randomize(inject(Net(width=200, depth=6), config=LoRAConfig(r=3)))
    if quantized:
        quantize(model)
    written = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(export, "_AT_ONCE", threads)
        written.append((export_merged(model, tmp_path / str(threads)) / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_a_trained_bias_that_is_not_finite_is_not_written(tmp_path):
    model = inject(Net(), "q_proj", LoRAConfig(r=2), train_bias="all")
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(MergeError, match=r"NaN or infinity in norm\.bias"):
        export_merged(model, tmp_path / "out")
