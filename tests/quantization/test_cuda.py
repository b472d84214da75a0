"""NF4 and the paged optimizer on a GPU. They need one: run ``pytest -m gpu`` on a machine that has it."""

import copy

import pytest
import torch
from bitsandbytes import functional as bnb
from lightning.pytorch import Trainer
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, NF4Config, inject, merge, quantize
from lightning_lora.optim.paged_adamw import paged_adamw_8bit
from lightning_lora.optim.report import optimizer_report
from lightning_lora.quantization.nf4 import NF4Linear
from tests.callbacks.conftest import Module, loader
from tests.conftest import Net, randomize, relative_difference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (33, 71), (513, 1026)])
def test_codes_and_weights_equal_bitsandbytes_bit_for_bit(dtype, double_quant, shape):
    dense = nn.Linear(shape[1], shape[0], dtype=dtype, device="cuda").requires_grad_(False)
    codes, state = bnb.quantize_4bit(dense.weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    ours = NF4Linear.from_linear(dense, NF4Config(double_quant=double_quant))
    assert torch.equal(ours.codes, codes.reshape(-1))
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state))


def test_layers_are_quantized_on_the_gpu_one_at_a_time_and_come_back_unchanged():
    model = inject(Net())
    quantize(model, device="cuda")
    layer = model.blocks[0]["q_proj"]
    weight = layer.base_layer.dequantize(torch.float32)
    assert {p.device.type for p in layer.parameters()} == {"cuda"}
    assert (
        relative_difference(model.to("cpu").blocks[0]["q_proj"].base_layer.dequantize(torch.float32), weight.cpu()) == 0
    )


def test_a_whole_run_trains_merges_and_resumes(tmp_path):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = Module()
        trainer = Trainer(
            accelerator="gpu", devices=1, max_epochs=epochs, callbacks=[LoRACallback(r=4)], default_root_dir=tmp_path,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        return module, trainer.checkpoint_callback.best_model_path

    straight, _ = run(4)
    _, path = run(2)
    resumed, _ = run(4, path)
    assert straight.losses[-1] < straight.losses[0]
    assert resumed.losses == pytest.approx(straight.losses[8:], rel=1e-5)  # atomics in GPU kernels reorder sums


def test_merged_and_adapted_model_agree():
    model = quantize(randomize(inject(Net().cuda())))
    tokens = torch.randint(16, (4, 10), device="cuda")
    adapted = copy.deepcopy(model)(tokens)
    assert relative_difference(merge(model)(tokens), adapted) <= 1e-5


def test_large_moments_are_paged_and_small_ones_are_not():
    model = inject(
        nn.Sequential(nn.Linear(8192, 64, device="cuda"), nn.Linear(64, 8, device="cuda")), "0", LoRAConfig()
    )
    optimizer = paged_adamw_8bit(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    before = optimizer_report(optimizer)
    model(torch.randn(4, 8192, device="cuda")).sum().backward()
    optimizer.step()
    after = optimizer_report(optimizer)
    assert (before.in_8bit, before.paged) == (after.in_8bit, after.paged) == (1, 1)  # A has 131,072 elements, B 1,024
