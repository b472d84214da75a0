"""The merged model is the trained function."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, MergeError, NF4Config, disabled, inject, merge, quantize
from lightning_lora.cli.demo import corpus, pretrain
from lightning_lora.model.layers import replace
from lightning_lora.model.merge import merged
from lightning_lora.model.split import hosts
from tests.conformance.combinations import Experts, SelfAttention
from tests.conftest import randomize, relative_difference

BASES = [None, NF4Config(), NF4Config(double_quant=False, block_size=128)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_merge_gives_the_adapted_logits_and_the_original_keys(net, tokens, base, scaling):
    keys, shapes = list(net.state_dict()), [v.shape for v in net.state_dict().values()]
    randomize(inject(net, config=LoRAConfig(r=8, scaling=scaling)))
    if base is not None:
        quantize(net, base)
    adapted = net(tokens)
    merge(net)
    assert relative_difference(net(tokens), adapted) <= 1e-5  # fp32, summed in another order
    assert (list(net.state_dict()), [v.shape for v in net.state_dict().values()]) == (keys, shapes)
    assert {type(m) for m in net.modules()} == {
        type(net),
        nn.Embedding,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Linear,
        nn.LayerNorm,
    }


@pytest.mark.parametrize("base", BASES)
def test_a_real_model_merges_exactly_and_to_two_in_a_thousand_in_bfloat16(base):
    """The demo's pretrained model on English, with adapters a tenth the size of its weights."""
    tokens = corpus.windows(corpus.english().held_out, 128, limit=40)[:, :-1]
    model = randomize(inject(pretrain.load_base(), config=LoRAConfig(r=8)), std=0.03)
    if base is not None:
        quantize(model, base)
    with torch.no_grad():
        adapted = model(tokens)
        exact = merge(copy.deepcopy(model))(tokens)
        # Products in float32, so that only the merged weights are rounded, to 2^-9 of each at most
        rounded = merge(model, dtype=torch.bfloat16).float()(tokens)
    assert relative_difference(exact, adapted) <= 1e-5  # fp32, summed in another order
    worst = ((rounded - adapted).flatten(1).norm(dim=1) / adapted.flatten(1).norm(dim=1)).max()  # of all sequences
    assert worst <= 2e-3


class Counted(Experts):
    """Experts with a second stack, a buffer, and one in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, 16, 12))
        self.register_buffer("scale", torch.ones(12))
        self.act = nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        return self.act(torch.einsum("eio,...o->...i", self.down, super().forward(x) * self.scale))


@pytest.mark.parametrize(
    ("build", "target", "width"),
    [(lambda: nn.Linear(16, 8), "0", 16), (SelfAttention, "v_proj", 32), (Counted, "0.up", 16)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_merged_stays_as_it_is_when_the_adapted_layers_are_moved(build, target, width, packed):
    """As the callback moves them to the CPU, to go on with later; a cast changes tensors in the same way."""
    model, x = nn.Sequential(build()).eval(), torch.randn(3, 5, width)
    inject(model, target, LoRAConfig(r=2))
    model = quantize(model) if packed else model
    (host,) = hosts(model).values()
    plain = merged(host)
    replace(model, {host: plain})
    expected = model(x)
    host.double()
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("ratio", [0.004, 0.04])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_update_survives_the_merge_over_nf4(ratio, dtype):
    """Re-quantizing keeps about 1% of an update of 0.4% of the weight's norm; a merge has to keep all of it."""
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    nn.init.normal_(model[0].weight, std=0.02)
    randomize(inject(model, config=LoRAConfig(r=16, alpha=16)), std=1.0)
    host = quantize(model)[0]
    adapter = host.adapter("default")
    weight = host.base_layer.dequantize(torch.float32)
    with torch.no_grad():
        adapter.lora_B *= ratio * weight.norm() / (adapter.lora_B @ adapter.lora_A).norm()
        update = adapter.lora_B @ adapter.lora_A
    assert update.norm() / weight.norm() == pytest.approx(ratio, rel=1e-4)
    found = merge(model, dtype=dtype)[0].weight.float() - weight
    assert (found * update).sum() / update.square().sum() == pytest.approx(1.0, abs=0.01)


def test_bias_hooks_and_mode_of_the_original_layer_survive():
    calls = []
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)).eval()
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    x = torch.randn(3, 8)
    y = randomize(inject(model, config=LoRAConfig(r=2)))(x)
    merge(model)
    calls.clear()
    assert torch.allclose(model(x), y, atol=1e-6)
    assert calls == ["hook"]
    assert not model[0].training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_merge_before_anything_changes(net, bad):
    randomize(inject(net))
    with torch.no_grad():
        net.blocks[1]["up_proj"].adapter("default").lora_B[0, 0] = bad
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        MergeError, match=r"NaN or infinity in blocks.1.up_proj \(its merged weight\); nothing was merged"
    ):
        merge(net)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(
            after[key],
            before[key],
        )
        or key.endswith("1.up_proj.adapters.default.lora_B")
        for key in before
    )


def test_overflow_of_a_narrow_dtype_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    randomize(inject(model, config=LoRAConfig(r=1)))
    with torch.no_grad():
        model[0].base_layer.weight.fill_(7e4)
    with pytest.raises(MergeError, match=r"dtype=torch\.float32"):
        merge(model, dtype=torch.float16)


def test_merge_after_a_cast_of_the_model_gives_layers_of_that_dtype(net, tokens):
    randomize(inject(net))
    quantize(net).to(torch.bfloat16)
    adapted = net(tokens)
    assert merge(net).blocks[0]["q_proj"].weight.dtype == torch.bfloat16
    assert relative_difference(net(tokens).float(), adapted.float()) < 0.05  # all products in bf16, twice


def test_the_base_is_untouched_by_training_and_merging_elsewhere(net, tokens):
    base = net(tokens)
    randomize(inject(net))
    with disabled(net):
        assert torch.equal(net(tokens), base)


def test_autocast_does_not_round_the_update(net, tokens):
    randomize(inject(net, config=LoRAConfig(r=8)))
    adapted = net(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge(net)
    assert relative_difference(net(tokens), adapted) <= 1e-5  # fp32, summed in another order
