"""NF4 and the paged optimizer on a GPU. They need one: run ``pytest -m gpu`` on a machine that has it."""

import copy
import io

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import Trainer
from torch import nn

from lightning_lora import LoRACallback, NF4Config, inject, merge, quantize
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.paged_adamw import paged_adamw_8bit
from lightning_lora.optim.report import optimizer_report
from lightning_lora.quantization.nf4 import NF4Linear
from tests.conftest import Net, randomize, relative_difference
from tests.runs import Module, loader

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


def adapters_of(count: int, names: str = "layer.{}") -> dict[str, nn.Parameter]:
    """Factors of rank 16 over 4096 features: each of 65,536 elements, which bitsandbytes does not page."""
    return {names.format(index): nn.Parameter(torch.randn(16, 4096, device="cuda")) for index in range(count)}


def draw_gradients(*twins) -> None:
    for same in zip(*twins, strict=True):
        gradient = torch.randn_like(same[0])
        for parameter in same:
            parameter.grad = gradient.clone()


def one_by_one(parameters) -> torch.optim.Optimizer:
    return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-2, weight_decay=0.1)


def over(parameters: dict[str, nn.Parameter]) -> FlatPagedAdamW8bit:
    names = {p: name for name, p in parameters.items()}
    return FlatPagedAdamW8bit(list(parameters.values()), lr=1e-2, weight_decay=0.1, names=names)


def test_moments_of_small_adapters_are_paged_together():
    optimizer = paged_adamw_8bit(torch.optim.AdamW(adapters_of(8).values()))
    before = optimizer_report(optimizer)
    draw_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    after = optimizer_report(optimizer)
    assert (before.in_8bit, before.paged) == (after.in_8bit, after.paged) == (8, 8)
    (moments,) = optimizer.moments()
    assert moments.tensors["state1"].is_paged


@pytest.mark.parametrize("side_stream", [False, True])
def test_one_update_has_the_numbers_of_bitsandbytes_on_the_gpu(side_stream):
    """Also on a stream of the user's: bitsandbytes launches on the default one."""
    ours = adapters_of(8) | {"norm": nn.Parameter(torch.randn(100, device="cuda"))}
    theirs = copy.deepcopy(list(ours.values()))
    optimizer, reference = over(ours), one_by_one(theirs)
    for _ in range(4):
        draw_gradients(ours.values(), theirs)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if side_stream else torch.cuda.default_stream()):
            optimizer.step()
        torch.cuda.synchronize()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))


def test_a_resumed_optimizer_is_paged_and_goes_on_bit_for_bit():
    """Lightning moves what it finds in an optimizer's state to the GPU after loading; ours stays where it is."""
    parameters = adapters_of(8)
    optimizer = over(parameters)
    for _ in range(2):
        draw_gradients(parameters.values())
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    other = over(resumed)
    other.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    _optimizer_to_device(other, torch.device("cuda"))
    assert optimizer_report(other).paged == 8
    for _ in range(2):
        draw_gradients(parameters.values(), resumed.values())
        optimizer.step()
        other.step()
    assert all(torch.equal(p, resumed[name]) for name, p in parameters.items())


def test_a_copy_of_paged_moments_is_paged_memory_of_its_own():
    parameters = list(adapters_of(4).values())
    optimizer = FlatPagedAdamW8bit(parameters)
    draw_gradients(parameters)
    optimizer.step()
    twins, twin = copy.deepcopy((parameters, optimizer))
    draw_gradients(parameters, twins)
    for stepper in (optimizer, twin):
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))
    pointers = {each.moments()[0].tensors["state1"].data_ptr() for each in (optimizer, twin)}
    assert len(pointers) == 2
    assert all(each.moments()[0].tensors["state1"].is_paged for each in (optimizer, twin))
