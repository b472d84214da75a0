"""An estimate is what a run takes: parts counted from shapes are exact, the peak is that of the allocator."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, NF4Config, inject, quantize
from lightning_lora.errors import AdapterError, QuantizationError, TargetError, UnsupportedError
from lightning_lora.estimation.estimate import estimate, standing
from lightning_lora.estimation.replay import PARTS, default_step, recompute
from lightning_lora.estimation.setup import METHODS, Setup
from lightning_lora.estimation.storage import STORAGES, Blockwise
from lightning_lora.metrics.memory import SavedActivations, holdings
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from tests.estimation.allocations import peak_allocations

MIB = 2**20


class Block(nn.Module):
    """As in GPT: four square projections and an MLP four times as wide."""

    def __init__(self, d: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(d, d))
        self.up_proj, self.down_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = (self.get_submodule(name)(x).unsqueeze(1) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.down_proj(F.gelu(self.up_proj(x)))


class Language(nn.Module):
    def __init__(self, d=128, blocks=3, vocabulary=500):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(blocks))
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens.flatten())


TOKENS = torch.zeros(4, 64, dtype=torch.long)


def on_meta(*args):
    with torch.device("meta"):
        return Language(*args)


@pytest.mark.parametrize(
    ("d", "layers", "adapters", "optimizer"),
    [(4096, 32, 288, 1152), (5120, 40, 450, 1800), (6656, 60, 877.5, 3510), (8192, 80, 1440, 5760)],
)
def test_adapters_and_optimizer_are_those_of_figure_6_of_qlora(d, layers, adapters, optimizer):
    # QLoRA (arXiv 2305.14314), figure 6: 7B, 13B, 33B and 65B at r=64, in MiB. Adapters in 16 bits, moments in 32.
    parts = standing(on_meta(d, layers, 32000), Setup(r=64, optimizer="paged_adamw_32bit"))
    assert parts["adapters"] == adapters * MIB
    assert parts["optimizer"] == optimizer * MIB


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (100, 64), (333, 130)])
def test_nf4_takes_the_bytes_that_a_quantized_layer_has(shape, double_quant):
    model = inject(nn.Sequential(nn.Linear(*shape[::-1]), nn.Linear(shape[0], 2)), "0", LoRAConfig(r=2))
    base = quantize(model, NF4Config(double_quant=double_quant))[0].base_layer
    stored = sum(t.numel() * t.element_size() for name, t in base.named_buffers() if name != "_like")
    assert Blockwise(double_quant=double_quant).bytes(*shape) == stored


@pytest.mark.parametrize(("bits", "expected"), [(8, 8.0078125), (4, 4.126953125), (3, 3.126953125)])
def test_storages_take_the_published_bits_per_weight(bits, expected):
    # bits + 8/64 + 32/(64 * 256), and one mean of 4 bytes; int8: a float32 for each of the 4096 outputs
    assert STORAGES[bits].bytes(4096, 4096) * 8 / 4096**2 == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora-4bit"])
def test_what_stays_is_what_a_run_holds(method):
    setup = Setup(method=method, r=4, precision="32-true", train=("blocks.2",) if method == "freeze" else ())
    model = trained_for_real(Language(), setup)
    optimizer = FlatPagedAdamW8bit([p for p in model.parameters() if p.requires_grad])
    model(TOKENS).backward()
    optimizer.step()
    held = holdings(model)
    found = standing(Language(), setup)
    assert found["optimizer"] == sum(t.nbytes for moments in optimizer.moments() for t in moments.tensors.values())
    for part, size in held.to_dict().items():
        if part in ("base", "adapters", "trained"):
            assert found.get(part, 0) == size, part


def trained_for_real(model, setup):
    if setup.method == "freeze":
        model.requires_grad_(False).get_submodule(setup.train[0]).requires_grad_(True)
    if "lora" in setup.method:
        inject(model, config=LoRAConfig(r=setup.r))
    return quantize(model) if "qlora" in setup.method else model


def test_activations_are_what_autograd_saves():
    model = inject(Language(), config=LoRAConfig(r=4))
    with SavedActivations(model) as saved:
        model(TOKENS)
    parts = estimate(on_meta(), TOKENS, Setup(method="lora", r=4, precision="32-true")).parts
    # At the peak, in the backward pass of the loss, a few tensors more are there, and the logits' gradient
    assert saved.bytes <= parts["activations"] + parts["logits"] <= 1.25 * saved.bytes


@pytest.mark.parametrize("checkpointing", [None, "blocks"])
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora-4bit"])
def test_the_total_is_the_peak_of_the_allocator_within_a_tenth(method, checkpointing):
    setup = Setup(
        method=method, r=4, precision="32-true", device="cpu", activation_checkpointing=checkpointing,
        train=("blocks.2",) if method == "freeze" else (),
    )  # fmt: skip
    model = trained_for_real(Language(), setup)
    recompute(model, checkpointing)
    optimizer = FlatPagedAdamW8bit([p for p in model.parameters() if p.requires_grad])

    def two_steps():
        for _ in range(2):
            loss = model(TOKENS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    before = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    measured = before + peak_allocations(two_steps)
    assert estimate(on_meta(), TOKENS, setup).total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_estimated_on_the_meta_device(method):
    estimated = estimate(on_meta(), TOKENS.to("meta"), Setup(method=method, r=4))
    assert tuple(estimated.parts) == PARTS
    assert estimated.total == sum(estimated.parts.values()) > 0
    assert any("formula" in note for note in estimated.notes) == (method in ("galore", "badam"))


def test_fewer_bits_and_recomputed_blocks_take_less():
    sizes = [estimate(on_meta(), TOKENS, Setup(method=f"qlora-{bits}bit", r=4)).total for bits in (8, 4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    recomputed = estimate(on_meta(), TOKENS, Setup(r=4, activation_checkpointing="blocks")).total
    assert recomputed < sizes[1]


def test_weights_that_stay_dequantized_are_part_of_the_base():
    none, some = (estimate(on_meta(), TOKENS, Setup(r=4, dequantized_cache=size)).parts for size in (0, 50_000))
    weights = [
        2 * m.weight.numel()
        for name, m in Language().named_modules()
        if name.startswith("blocks") and isinstance(m, nn.Linear)
    ]
    room, kept = 50_000, 0
    for size in weights:
        kept += size if size <= room - kept else 0
    assert 0 < kept == some["base"] - none["base"]
    with pytest.raises(ValueError, match="dequantized_cache is of no use to method='lora'"):
        Setup(method="lora", dequantized_cache=1)


def test_badam_takes_two_bytes_per_weight_and_sixteen_per_weight_of_a_block():
    model = on_meta()
    parts = estimate(model, TOKENS, Setup(method="badam")).parts
    block, whole = (sum(p.numel() for p in m.parameters()) for m in (model.blocks[0], model))
    assert parts["base"] + parts["trained"] == 2 * whole
    assert parts["optimizer"] == (16 - 2) * block  # the gradient, in 16 bits, is counted as one


def test_mixed_precision_keeps_parameters_and_halves_activations():
    true, mixed = (estimate(on_meta(), TOKENS, Setup(method="lora", precision=p)) for p in ("32-true", "bf16-mixed"))
    assert mixed.parts["base"] == true.parts["base"]
    assert mixed.parts["activations"] < true.parts["activations"]


def test_the_model_stays_as_it_is():
    model = Language()
    before = copy.deepcopy(model.state_dict())
    estimate(model, TOKENS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None and type(p) is nn.Parameter for p in model.parameters())


def test_a_shared_weight_counts_once():
    model = Language()
    model.head.weight = model.embed.weight
    assert standing(Language(), Setup())["base"] - standing(model, Setup())["base"] == 2 * 500 * 128


def test_a_forward_pass_that_reads_numbers_is_refused():
    class Reads(Language):
        def forward(self, tokens):
            return super().forward(tokens[:, : int(tokens.max())])

    with pytest.raises(UnsupportedError, match=r"reads a number of torch.int64 out of a tensor"):
        estimate(Reads(), TOKENS)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of full, freeze, lora.*got 'qlora'"):
        Setup(method="qlora")
    with pytest.raises(AdapterError, match="holds adapters already"):
        estimate(inject(Language()), TOKENS)
    with pytest.raises(TypeError, match="gives no loss for this batch"):
        estimate(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4), Setup(r=2))
    with pytest.raises(TargetError, match="no list of equal modules"):
        estimate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4), Setup(method="badam"))
    with pytest.raises(QuantizationError, match="none of the 1 adapted layers"):
        estimate(
            nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
            torch.zeros(2, dtype=torch.long),
            Setup(targets="0", r=2),
            step=lambda model, batch: model(batch).sum(),
        )


def test_a_training_step_gives_the_loss():
    class Module(Language):
        def training_step(self, batch, index):
            return {"loss": self(batch[0])}

    setup = Setup(r=4)
    assert estimate(Module(), [TOKENS], setup).total == estimate(Language(), TOKENS, setup).total
    assert default_step(Language(), TOKENS).dim() == 0
