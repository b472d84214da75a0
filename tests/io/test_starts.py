"""Adapters that start in the base weight, on disk: plain LoRAs that make the same change to the original base."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    quantize,
    save_adapter,
)
from lightning_lora.model.layers import adapted_layers
from tests.conftest import Net, randomize, relative_difference

STARTS = ["pissa", "pissa_niter_4", "olora"]
SCALINGS = [{"alpha": 6}, {"alpha": 6, "scaling": "rslora"}]


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(model: nn.Module) -> nn.Module:
    """A little away from the start, as after a training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("settings", SCALINGS)
@pytest.mark.parametrize("init", STARTS)
def test_peft_and_we_give_the_same_logits_on_the_original_base(init, settings, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(inject(base(), config=LoRAConfig(r=4, init=init, **settings)))
    save_adapter(model, tmp_path)
    expected = model(tokens)
    assert relative_difference(base()(tokens), expected) > 0.05
    # float32; the factors are the very same, the order of summation is not
    assert relative_difference(peft.PeftModel.from_pretrained(base(), str(tmp_path))(tokens), expected) <= 1e-5
    assert relative_difference(load_adapter(base(), tmp_path)(tokens), expected) <= 1e-5


@pytest.mark.parametrize("settings", SCALINGS)
def test_the_rank_doubles_and_the_scaling_stays(settings, tmp_path):
    config = LoRAConfig(r=4, init="pissa", **settings)
    model = inject(base(), config=config)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 8
    assert written["init_lora_weights"] is True
    loaded = adapted_layers(load_adapter(base(), tmp_path))["downs.0"].adapter("default")
    assert loaded.config.scale == pytest.approx(config.scale, rel=1e-15)
    assert {len(t) for key, t in adapter_state_dict(model).items() if "lora_A" in key} == {8}


@pytest.mark.parametrize("init", [*STARTS, "loftq"])
def test_over_nf4_the_folder_holds_the_change_that_was_trained(init, tokens, tmp_path):
    """The quantized base is not in the folder: on the original one the change stands alone, at the start none."""
    model = quantize(inject(base(), config=LoRAConfig(r=4, init=init)))
    save_adapter(model, tmp_path / "start")
    assert torch.equal(load_adapter(base(), tmp_path / "start")(tokens), base()(tokens))
    starts = {
        path: (layer.adapter("default").lora_A.detach().clone(), layer.adapter("default").lora_B.detach().clone())
        for path, layer in adapted_layers(model).items()
    }
    trained(model)
    save_adapter(model, tmp_path / "trained")
    expected = base()
    with torch.no_grad():
        for path, (A0, B0) in starts.items():
            adapter = adapted_layers(model)[path].adapter("default")
            expected.get_submodule(path).weight += adapter.config.scale * (adapter.lora_B @ adapter.lora_A - B0 @ A0)
    assert relative_difference(load_adapter(base(), tmp_path / "trained")(tokens), expected(tokens)) <= 1e-5


def test_loftqs_change_fits_the_original_base_better_than_what_its_base_lacks():
    """What is written is measured from the start: measured from the pair before it, it would miss by more."""
    model = quantize(inject(base(), config=LoRAConfig(r=8, init="loftq")))
    for path, layer in adapted_layers(model).items():
        adapter, weight = layer.adapter("default"), base().get_submodule(path).weight
        taken = adapter.taken_B.view(torch.float32) @ adapter.taken_A.view(torch.float32)
        start = adapter.lora_B0 @ adapter.lora_A0
        with torch.no_grad():
            target = layer.base_layer.dequantize(torch.float32)
            missed = [(weight - adapter.config.scale * pair - target).norm() for pair in (start, taken)]
        assert missed[0] < missed[1]


def test_twice_the_rank_of_a_full_rank_adapter_is_the_full_rank(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7))
    plain = copy.deepcopy(model)
    trained(inject(model, "*", LoRAConfig(r=4, init="pissa")))
    save_adapter(model, tmp_path)
    loaded = load_adapter(plain, tmp_path)
    assert [layer.adapter("default").config.r for layer in adapted_layers(loaded).values()] == [5, 5]
    x = torch.randn(3, 6)
    assert relative_difference(loaded(x), model(x)) <= 1e-5


def test_a_loaded_folder_is_refused_over_the_adapter_it_was_written_from(tmp_path):
    model = inject(base(), config=LoRAConfig(r=4, init="pissa"))
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="r is 8 there and 4 here"):
        load_adapter(model, tmp_path)


def test_the_merged_model_is_the_trained_one(tokens):
    model = randomize(inject(base(), config=LoRAConfig(r=4, init="pissa")))
    expected = model(tokens)
    assert relative_difference(merge(model)(tokens), expected) <= 1e-5


def test_an_adapter_that_still_waits_for_its_start_is_not_saved(tmp_path):
    model = inject(nn.Sequential(nn.Linear(8, 8)), "0", LoRAConfig(r=2, init="eva"))
    with pytest.raises(AdapterError, match=r"init='eva' starts from data: call initialize_eva\(model, batches\) first"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
