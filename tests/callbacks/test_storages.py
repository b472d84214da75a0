"""Every storage of the base through the callback: trained, resumed, loaded and merged; another one is refused."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_lora import AdapterError, CheckpointError, LoRACallback, load_from_checkpoint, merge
from tests.conftest import relative_difference
from tests.runs import Module, fresh, loader

TOKENS = torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(2))
INITS = {"fp4": "kaiming", "nf3": "kaiming", "nf2": "loftq", "int8": "kaiming"}


@pytest.mark.parametrize("storage", INITS)
def test_a_run_resumes_loads_and_merges_over_every_storage(storage, trainer, tmp_path):
    def lora(**settings) -> LoRACallback:
        return LoRACallback(**{"r": 4, "quantization": storage, "init": INITS[storage], "merge": False} | settings)

    whole = fresh()
    trainer(lora()).fit(whole, loader(shuffle=True))
    half, first = fresh(), trainer(lora(), max_epochs=1)
    first.fit(half, loader(shuffle=True))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = fresh(), trainer(lora())
    second.fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, ours), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, expected), name
    second.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=f"quantization is '{storage}"):
        trainer(lora(quantization="nf4")).fit(fresh(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    with pytest.raises(AdapterError, match=f"quantization is 'nf4' there and '{storage}"):
        trainer(lora(quantization="nf4")).fit(whole, loader())
    seed_everything(0, verbose=False)  # the same base
    loaded = load_from_checkpoint(Module, tmp_path / "run.ckpt")
    expected = whole.eval()(TOKENS)
    assert torch.equal(loaded(TOKENS), expected)
    assert relative_difference(merge(loaded)(TOKENS), expected) <= 1e-5  # float32, another order of summation


def test_nf2_with_a_plain_start_warns_before_training(trainer):
    with pytest.warns(UserWarning, match="quantization='nf2' loses 57% of Gaussian weights"):
        trainer(LoRACallback(quantization="nf2"), fast_dev_run=True).fit(fresh(), loader())
