"""Embeddings and output heads in 8 bit through the callback: trained, resumed, loaded and merged."""

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_lora import AdapterError, CheckpointError, LoRACallback, QuantizationError, load_from_checkpoint, merge
from lightning_lora.strategies.lora import LoRAStrategy
from tests.conftest import Net, relative_difference
from tests.runs import Module, loader

TOKENS = torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(2))


def fresh() -> Module:
    seed_everything(0, verbose=False)
    return Module()


def lora(**settings) -> LoRACallback:
    return LoRACallback(**{"r": 4, "embeddings": "int8", "merge": False} | settings)


@pytest.mark.parametrize("targets", ["all-linear", ["*.q_proj", "embed", "head"]])
def test_a_run_resumes_loads_and_merges_with_both_in_8_bit(targets, trainer, tmp_path):
    whole = fresh()
    plain = {key: tensor.shape for key, tensor in whole.state_dict().items()}
    trainer(lora(targets=targets)).fit(whole, loader(shuffle=True))
    half, first = fresh(), trainer(lora(targets=targets), max_epochs=1)
    first.fit(half, loader(shuffle=True))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = fresh(), trainer(lora(targets=targets))
    second.fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, ours), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, expected), name
    second.save_checkpoint(tmp_path / "run.ckpt")
    assert "adapters" in "".join(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    with pytest.raises(CheckpointError, match="embeddings is"):
        trainer(lora(targets=targets, embeddings=None)).fit(
            fresh(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    with pytest.raises(AdapterError, match="embeddings is None there and"):
        trainer(lora(targets=targets, embeddings=None)).fit(whole, loader())
    seed_everything(0, verbose=False)  # the same base
    loaded = load_from_checkpoint(Module, tmp_path / "run.ckpt")
    expected = whole.eval()(TOKENS)
    assert torch.equal(loaded(TOKENS), expected)
    found = merge(loaded)
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == plain
    assert relative_difference(found(TOKENS), expected) <= 1e-5  # float32, another order of summation


def test_after_a_merge_the_module_is_plain_and_a_second_fit_goes_on(trainer):
    module, expected = fresh(), fresh()
    keys = list(module.state_dict())
    callback = lora(merge=True)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert list(module.state_dict()) == keys
    trainer(lora(merge=True), max_epochs=1).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert not torch.equal(module.state_dict()[keys[0]], expected.state_dict()[keys[0]])  # 8 bit of it


def test_a_strategy_takes_the_word_too(trainer):
    assert LoRAStrategy(embeddings="int8").lora.settings.embeddings == "int8"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization": None}, "embeddings='int8' stores embeddings .* and quantization is None"),
        ({"embeddings": "nf4"}, "embeddings must be None or one of int8"),
        ({"method": "full"}, "has no use for r, embeddings"),
    ],
)
def test_words_that_cannot_be_honoured_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        lora(**settings)


def test_tied_weights_are_refused_before_anything_changes(trainer):
    module = Module(Net(out=16))
    module.net.head.weight = module.net.embed.weight
    keys = list(module.state_dict())
    with pytest.raises(QuantizationError, match=r"is one parameter with another \(net.embed.weight, net.head.weight\)"):
        trainer(lora()).fit(module, loader())
    assert list(module.state_dict()) == keys
