"""The base fingerprint: an adapter goes onto the base it was trained on, and onto another one only when asked to."""

from __future__ import annotations

import copy
import hashlib
import logging
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_lora import AdapterError, inject, load_adapter, quantize, save_adapter
from lightning_lora.io.fingerprint import base_fingerprint, compare, to_json
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn import fingerprint as module_under_test
from lightning_lora.nn.fingerprint import Fingerprint, combined, fingerprint, fingerprints
from tests.conftest import Net, randomize

WEIGHTS = "adapter_model.safetensors"


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return Net().to(dtype)


def trained(*, seed: int = 0, quantized: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = inject(base(seed, dtype))
    return randomize(quantize(model) if quantized else model)


def refused(model: nn.Module, folder) -> str:
    """The error of loading ``folder`` into ``model``, which stays as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error.value)


# ---- of one weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_sha256_over_the_bytes(dtype):
    weight = torch.randn(600, 700).to(dtype)
    expected = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert fingerprint(weight).whole == expected
    assert fingerprint(weight.t().contiguous().t()).whole == expected


def test_every_byte_counts():
    weight = torch.randn(600, 700)
    found = fingerprint(weight)
    weight[301, 333] += 1e-3
    assert fingerprint(weight).whole != found.whole


def test_a_weight_changed_in_place_has_another_one():
    weight = nn.Parameter(torch.randn(600, 700), requires_grad=False)
    found = fingerprint(weight)
    weight.data[301, 333] += 1  # through .data, which does not count as a change of version
    weight.data = weight.data.clone()
    assert fingerprint(weight).whole != found.whole


def test_of_a_large_model_first_and_last_bytes_and_an_even_sample_count(monkeypatch):
    monkeypatch.setattr(module_under_test, "WHOLE_UP_TO", 1000)
    weight = torch.zeros(1024, 1024)
    found = fingerprints({"a": weight})["a"]
    assert found.whole is None
    for place in (0, -1, len(weight.flatten()) // 15):
        changed = weight.clone()
        changed.view(-1)[place] = 1
        assert not fingerprints({"a": changed})["a"].same_bytes(found)
        assert not fingerprint(changed).same_bytes(found)  # also compared with one that was hashed whole
    assert fingerprint(weight).same_bytes(found)


def test_what_this_process_does_not_hold_has_none():
    assert fingerprints({"meta": torch.empty(2, 2, device="meta")}) == {}


def test_it_survives_json_and_anything_else_is_refused():
    found = fingerprint(torch.randn(3, 4))
    assert Fingerprint.from_json(found.to_json()) == found
    for broken in (None, 5, "x", [], {}, {"shape": 3}, {**found.to_json(), "dtype": "nn"}, {**found.to_json(), "x": 1}):
        with pytest.raises(ValueError, match="no fingerprint"):
            Fingerprint.from_json(broken)


# ---- of a base, in an adapter folder


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_the_base_trained_on_is_known_whether_it_is_quantized_or_not(quantized, onto, tmp_path, caplog):
    save_adapter(trained(quantized=quantized), tmp_path)
    load_adapter(base(), tmp_path)
    there = trained(quantized=onto)
    load_adapter(there, tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("quantized", [False, True])
def test_another_base_is_refused_naming_the_layers_and_both(quantized, tmp_path):
    save_adapter(trained(quantized=quantized), tmp_path)
    model = base()
    model.blocks[1]["q_proj"].weight.data[3, 3] += 1e-4
    said = refused(model, tmp_path)
    assert "blocks.1.q_proj (other values)" in said
    assert "blocks.0" not in said
    assert "allow_base_mismatch=True" in said
    fully = refused(base(seed=1), tmp_path)
    assert "and 1 more" in fully
    short = to_json(base_fingerprint({path: base().get_submodule(path) for path in adapted_layers(trained())}))
    assert f"trained on base {combined(compare(short, adapted_layers(trained())).ours)}" in fully


def test_a_mismatch_can_be_allowed(tmp_path):
    save_adapter(trained(), tmp_path)
    loaded = load_adapter(base(seed=1), tmp_path, allow_base_mismatch=True)
    assert len(adapted_layers(loaded)) == 6


def test_a_wider_base_is_rounded_before_it_is_compared(tmp_path):
    save_adapter(trained(dtype=torch.bfloat16), tmp_path)
    load_adapter(base(), tmp_path)
    assert "other values" in refused(base(seed=1), tmp_path)


def test_a_narrower_base_cannot_be_known_and_is_refused_with_the_way_round_it(tmp_path):
    save_adapter(trained(), tmp_path)
    said = refused(base(dtype=torch.bfloat16), tmp_path)
    assert "float32 there and bfloat16 here" in said
    assert "casting it afterwards is fine" in said
    load_adapter(base(), tmp_path).to(torch.bfloat16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_quantized_base_remembers_what_it_was_made_from_in_copies_and_pickles(copied, tmp_path):
    save_adapter(copied(trained(quantized=True)), tmp_path)
    load_adapter(base(), tmp_path)
    refused(base(seed=1), tmp_path)


def test_a_cast_of_the_whole_model_does_not_make_a_quantized_base_another_one(tmp_path):
    save_adapter(trained(quantized=True).to(torch.bfloat16), tmp_path)
    load_adapter(base(), tmp_path)


def test_codes_of_another_base_loaded_in_place_are_another_base(tmp_path):
    model = trained(quantized=True)
    model.load_state_dict(trained(seed=1, quantized=True).state_dict())
    save_adapter(model, tmp_path)
    assert "other values" in refused(trained(quantized=True), tmp_path)
    load_adapter(trained(seed=1, quantized=True), tmp_path)


def test_a_base_that_bitsandbytes_has_quantized_is_known_by_its_codes(tmp_path, caplog):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def foreign(seed: int = 0) -> nn.Module:
        model = base(seed)
        for path in adapted_layers(trained()):
            old = model.get_submodule(path)
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, old.bias is not None, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            model.set_submodule(path, new.to("cpu"))
        return model

    model = randomize(inject(foreign()))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert "nf4/64" in file.metadata()["lightning_lora"]
    load_adapter(foreign(), tmp_path)
    load_adapter(trained(quantized=True), tmp_path)  # the same codes, made by us
    assert not caplog.records
    assert "other values" in refused(foreign(seed=1), tmp_path)
    load_adapter(base(), tmp_path)
    assert "could not be checked in blocks.0.q_proj" in caplog.text


def test_a_file_by_another_program_loads_with_one_line_on_what_was_not_checked(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    save_adapter(trained(), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    with caplog.at_level(logging.INFO):
        load_adapter(base(seed=1), tmp_path)
    [record] = caplog.records
    assert record.name == "lightning_lora"
    assert "neither tensors nor base model could be checked" in record.getMessage()


def test_the_fingerprint_is_hashed_once_for_many_saves(tmp_path, monkeypatch):
    model = inject(nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8)))
    hashed = []
    real = module_under_test.sha256
    monkeypatch.setattr(module_under_test, "sha256", lambda *tensors: hashed.append(1) or real(*tensors))
    for index in range(3):
        save_adapter(model, tmp_path / str(index))
    assert len(hashed) == 1
