"""A checkpoint goes onto the base it was trained on, and onto no other."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from lightning_lora import LoRACallback
from lightning_lora.callbacks.checkpoints import KEY
from lightning_lora.errors import CheckpointError
from lightning_lora.io.fingerprint import base_fingerprint, to_json
from lightning_lora.model.layers import adapted_layers
from tests.runs import Module, loader


def run(trainer, module, **settings):
    made = trainer(LoRACallback(r=4, **settings), max_epochs=1)
    made.fit(module, loader())
    return made.checkpoint_callback.best_model_path


def fresh(seed: int = 0) -> Module:
    torch.manual_seed(seed)
    return Module()


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_run_resumed_over_another_base_is_refused_naming_both(quantization, trainer):
    path = run(trainer, fresh(), quantization=quantization)
    again = trainer(LoRACallback(r=4, quantization=quantization))
    with pytest.raises(CheckpointError, match=r"trained on base \w{12} and this model is \w{12}, .*q_proj \(other"):
        again.fit(fresh(seed=1), loader(), ckpt_path=path)
    trainer(LoRACallback(r=4, quantization=quantization)).fit(fresh(), loader(), ckpt_path=path)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_the_delta_is_not_added_twice_to_a_copy_of_a_merged_module(quantization, trainer):
    module = fresh()
    path = run(trainer, module, quantization=quantization)
    assert not adapted_layers(module)
    twin = copy.deepcopy(module)
    with pytest.raises(CheckpointError, match="another base model"):
        trainer(LoRACallback(r=4, quantization=quantization)).test(twin, loader(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_run_in_bfloat16_resumes_from_the_weights_it_was_given(quantization, trainer):
    settings = {"precision": "bf16-true", "max_epochs": 1}
    made = trainer(LoRACallback(r=4, quantization=quantization), **settings)
    made.fit(fresh(), loader())
    path = made.checkpoint_callback.best_model_path
    again = trainer(LoRACallback(r=4, quantization=quantization), **{**settings, "max_epochs": 2})
    again.fit(fresh(), loader(), ckpt_path=path)
    with pytest.raises(CheckpointError, match="another base model"):
        trainer(LoRACallback(r=4, quantization=quantization), **settings).fit(fresh(1), loader(), ckpt_path=path)


def test_the_fingerprint_is_plain_data_in_the_checkpoint(trainer):
    checkpoint = torch.load(run(trainer, fresh()), weights_only=True)
    found = checkpoint[KEY]["base_fingerprint"]
    assert found == to_json(base_fingerprint({path: fresh().get_submodule(path) for path in found}))
    assert sorted(found) == checkpoint[KEY]["targets"]


def test_a_checkpoint_without_one_loads_and_says_that_it_was_not_checked(trainer, caplog, tmp_path):
    checkpoint = torch.load(run(trainer, fresh()), weights_only=True)
    del checkpoint[KEY]["base_fingerprint"], checkpoint[KEY]["sha256"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with caplog.at_level(logging.INFO):
        trainer(LoRACallback(r=4)).fit(fresh(), loader(), ckpt_path=tmp_path / "old.ckpt")
    assert "does not say over which base" in caplog.text
