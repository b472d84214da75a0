"""Weights a few rows at a time: the same bits as at once, over every storage and layer whose rows merge alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import (
    DoRAConfig,
    FP4Config,
    Int8Config,
    LoRAConfig,
    LoRAFAConfig,
    NF2Config,
    NF3Config,
    NF4Config,
    activate,
    inject,
    quantize,
)
from lightning_lora.nn import pieces
from lightning_lora.nn.adapted import AdaptedLayer
from tests.conftest import randomize

STORAGES = {
    "dense": None,
    "nf4": NF4Config(),
    "nf4, plain": NF4Config(double_quant=False),
    "fp4": FP4Config(block_size=32),
    "nf3": NF3Config(double_quant=True),
    "nf2": NF2Config(),
    "int8": Int8Config(),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pieces, "_ELEMENTS", 1)  # 64 rows at a time, or as many as their blocks need


def stored(layer: nn.Module, config: object, storage: str) -> AdaptedLayer:
    torch.manual_seed(0)
    model = randomize(inject(nn.Sequential(layer), "*", config))
    if STORAGES[storage] is not None:
        quantize(model, STORAGES[storage])
    return model[0]


@pytest.mark.filterwarnings("ignore:.*NF2")
@pytest.mark.parametrize("storage", list(STORAGES)[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "count"), [(640, 256, 10), (600, 128, 4), (1, 64, 1), (5000, 100, 1)])
def test_the_pieces_of_a_storage_are_its_rows_bit_for_bit(rows, columns, count, dtype, storage):
    base = stored(nn.Linear(columns, rows), LoRAConfig(r=1), storage).base_layer
    found = list(base.pieces(dtype))
    assert torch.equal(torch.cat(found), base.dequantize(dtype))
    assert len(found) >= count  # where maxima share a constant, a piece ends with 256 blocks


@pytest.mark.filterwarnings("ignore:.*NF2")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("config", [LoRAConfig(r=4, alpha=5.5), LoRAFAConfig(r=4), LoRAConfig(r=4, init="pissa")])
def test_rows_merge_as_the_whole_weight_does(config, storage):
    layer = stored(nn.Linear(64, 640, dtype=torch.bfloat16), config, storage)
    found = list(layer.merged_pieces(torch.float32))
    assert len(found) > 1
    # Libraries may sum the products of another number of rows in another order.
    assert torch.allclose(torch.cat(found), layer.merged_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 320, 3), nn.Conv1d(8, 200, 2, groups=2)])
def test_rows_of_convolutions_merge_alone(layer):
    adapted = stored(layer, LoRAConfig(r=2), "dense")
    found = list(adapted.merged_pieces(torch.float32))
    assert len(found) > 1
    assert torch.allclose(torch.cat(found), adapted.merged_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "config"), [(nn.Embedding(640, 64), LoRAConfig(r=2)), (nn.Linear(64, 640), DoRAConfig(r=2))]
)
def test_what_does_not_merge_by_rows_comes_at_once(layer, config):
    adapted = stored(layer, config, "dense")
    (whole,) = adapted.merged_pieces(torch.float32)
    assert torch.equal(whole, adapted.merged_weight())


def test_several_adapters_merge_one_after_the_other_and_none_gives_the_base():
    layer = stored(nn.Linear(64, 640), LoRAConfig(r=2), "dense")
    model = nn.Sequential(layer)
    randomize(inject(model, "*", LoRAConfig(r=3), name="other"))
    activate(model, "default", "other")
    assert torch.allclose(torch.cat(list(layer.merged_pieces(torch.float32))), layer.merged_weight(), atol=1e-6)
    activate(model)
    assert torch.equal(torch.cat(list(layer.merged_pieces(torch.float32))), layer.base_layer.weight)


def test_autocast_rounds_nothing():
    layer = stored(nn.Linear(64, 640), LoRAConfig(r=2), "dense")
    expected = torch.cat(list(layer.merged_pieces(torch.float32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.cat(list(layer.merged_pieces(torch.float32))), expected)
