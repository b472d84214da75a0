"""``LoRACallback(dequantized_cache=...)``: the same run, and nothing left of it afterwards."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora import LoRACallback, QuantizationError
from lightning_lora.model.dequantized import kept_bytes
from tests.runs import Module, loader


class Watch(Callback):
    """What is kept at the end of each batch."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.kept.append(kept_bytes(module))


@pytest.mark.parametrize("merge", [True, False])
def test_a_run_is_the_same_and_keeps_weights_while_it_lasts(trainer, tmp_path, merge):
    runs = {}
    for size in (None, "1MB"):
        torch.manual_seed(0)
        module, watch = Module(), Watch()
        run = trainer(LoRACallback(r=4, merge=merge, dequantized_cache=size), watch)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        runs[size] = module.losses, module.state_dict(), saved, watch.kept
        assert kept_bytes(module) == 0
    losses, state, saved, kept = zip(*runs.values(), strict=True)
    assert losses[0] == losses[1]
    for tensors in (state, saved):
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not any(kept[0])
    assert all(kept[1])


def test_a_run_over_a_dense_base_is_refused(trainer):
    with pytest.raises(QuantizationError, match="dequantized_cache keeps dequantized weights, and no layer"):
        trainer(LoRACallback(r=4, quantization=None, dequantized_cache="1MB")).fit(Module(), loader())


def test_a_size_is_a_number_of_bytes_with_a_unit():
    with pytest.raises(ValueError, match="'plenty' is no size; write 24GB"):
        LoRACallback(dequantized_cache="plenty")


def test_methods_that_quantize_nothing_have_no_use_for_it():
    with pytest.raises(ValueError, match="method='full' quantizes nothing"):
        LoRACallback(method="full", dequantized_cache="1GB")
