"""Stacked weights of experts: the code around them computes with ``W_e + s B_e A_e``."""

import copy
import pickle

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import LoRAConfig, TargetError, delete_adapter, disabled, inject, merge, quantize, summary
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.targets import resolve
from lightning_lora.nn import split_experts
from lightning_lora.nn.split_experts import SplitExperts
from lightning_lora.quantization.stacks import NF4Stack
from tests.conftest import randomize, relative_difference

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(2, 26).reshape(3, 8)
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **SMALL))


def qwen2() -> nn.Module:
    """Beside its experts one that all tokens share, with a gate of a single output."""
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
    config = transformers.Qwen2MoeConfig(num_experts=4, **sizes, **SMALL)
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=12, head_dim=8, **SMALL)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Its experts are transposed and have biases."""
    config = transformers.GptOssConfig(num_local_experts=4, head_dim=8, pad_token_id=0, **SMALL)
    return transformers.GptOssForCausalLM(config)


class Products(nn.Module):
    """Hand-written experts: every token through every expert, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mix = Mix()
        self.head = nn.Linear(12, 8)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4))
        self.up = nn.Parameter(torch.randn(4, 12, 16))

    def forward(self, x):
        return torch.einsum("e,eoi,...i->...o", self.gate, self.up, x)


MODELS = {"mixtral": mixtral, "qwen2": qwen2, "qwen3": qwen3, "gpt-oss": gpt_oss, "products": Products}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    made = MODELS[request.param]().eval()
    for parameter in made.parameters():  # Hugging Face starts so small that logits are near 0
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def logits(model: nn.Module) -> torch.Tensor:
    out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def targets_of(model: nn.Module) -> list[str]:
    return ["mix.up"] if isinstance(model, Products) else TARGETS


def adapted(model: nn.Module, r: int = 3) -> nn.Module:
    return randomize(inject(model, targets_of(model), LoRAConfig(r=r, alpha=5)), std=0.3)


def updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """``s B_e A_e`` for each expert by itself, as the parameter stores it."""
    found = {}
    for path, layer in adapted_layers(model).items():
        adapter = layer.adapter("default")
        delta = torch.stack([adapter.config.scale * B @ A for A, B in zip(adapter.lora_A, adapter.lora_B, strict=True)])
        found[path] = delta.transpose(1, 2) if layer.kind.transposed else delta
    return found


def test_a_fresh_adapter_changes_nothing(model):
    before = logits(model)
    inject(model, targets_of(model), LoRAConfig(r=3))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("r", [3, 4])  # rows of 16 bytes are multiplied in groups, others are not
@pytest.mark.parametrize("code", ["eager", "grouped_mm", "batched_mm"])
def test_the_model_computes_with_the_changed_weights(model, code, r):
    """Against the plain model whose parameters were changed, whichever way it multiplies; so are the gradients."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(code)
    plain = copy.deepcopy(model)
    adapted(model, r)
    changed = updates(model)
    expected = torch.func.functional_call(
        plain, {path: plain.get_parameter(path).detach() + delta for path, delta in changed.items()}, (TOKENS,)
    )
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    found, trained = logits(model), [p for p in model.parameters() if p.requires_grad]
    assert relative_difference(found, expected) <= 1e-5  # fp32, another order of summation
    probe = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((y * probe).sum(), trained) for y in (found, expected))
    assert all(relative_difference(a, b) <= 1e-4 for a, b in zip(mine, theirs, strict=True))


def test_shapes_are_per_expert():
    adapter = adapted_layers(inject(mixtral(), TARGETS, LoRAConfig(r=3)))
    down = adapter["model.layers.0.mlp.experts.down_proj"].adapter("default")
    assert down.lora_A.shape == (4, 3, 24)
    assert down.lora_B.shape == (4, 16, 3)
    bound = 24**-0.5  # each expert starts as a layer of its own would
    assert 0.9 * bound < down.lora_A.abs().amax() <= bound
    assert not down.lora_B.any()


def test_merging_gives_the_module_back_with_the_adapted_function(model):
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = logits(adapted(model))
    merge(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    assert relative_difference(logits(model), expected) <= 1e-6  # the same sum
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_the_adapter_gives_the_very_parameters_back(model):
    before = dict(model.named_parameters())
    delete_adapter(adapted(model), "default")
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_one_of_the_stacks_by_choice():
    model = inject(mixtral(), "1.mlp.experts.down_proj", LoRAConfig(r=2))
    assert list(adapted_layers(model)) == ["model.layers.1.mlp.experts.down_proj"]
    assert sum(p.requires_grad for p in model.parameters()) == 2
    assert logits(model).isfinite().all()


def test_all_linear_leaves_experts_and_says_so():
    plan = resolve(mixtral(), "all-linear", LoRAConfig(r=2))
    assert not any("experts" in name for name in plan.layers)
    assert plan.left["model.layers.0.mlp.experts.down_proj"] == "a stack of experts; name it to adapt it"


def test_linear_layers_and_experts_together():
    model = inject(mixtral(), ["all-linear", *TARGETS], LoRAConfig(r=2))
    assert len(adapted_layers(model)) == 2 * (4 + 2)
    expected = logits(randomize(model, std=0.2))
    assert relative_difference(logits(merge(model)), expected) <= 1e-5


def test_disabled_computes_the_base(model):
    before = logits(model)
    with disabled(adapted(model)):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("packed", [False, True])
def test_copies_compute_the_same(clone, packed):
    model = adapted(Products())
    model = quantize(model) if packed else model
    twin = clone(model)
    assert torch.equal(logits(twin), logits(model))
    assert type(merge(twin).mix) is Mix


def test_hooks_stay_with_the_module():
    model, seen = Products(), []
    model.mix.register_forward_hook(lambda *_: seen.append("called"))
    logits(adapted(model))
    assert len(seen) == 1
    logits(merge(model))
    assert len(seen) == 2


def test_over_nf4_the_merged_model_is_the_trained_function(model):
    """The base is bitsandbytes' dequantized weight, experts one below the other."""
    dense = {path: p.detach().clone() for path, p in model.named_parameters()}
    quantize(adapted(model))
    packed = {path: layer.base_layer for path, layer in adapted_layers(model).items()}
    assert all(isinstance(base, NF4Stack) for base in packed.values())
    for path, base in packed.items():
        rows = dense[path].flatten(0, 1)
        codes, state = bitsandbytes.functional.quantize_4bit(
            rows, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        expected = bitsandbytes.functional.dequantize_4bit(codes, state)
        assert torch.equal(base.dequantize(torch.float32), expected.view(dense[path].shape))
    expected = logits(model)
    row = summary(model).layers[0]
    assert row.storage == "nf4/64 double-quantized"
    merge(model)
    assert {path: p.shape for path, p in model.named_parameters()} == {path: p.shape for path, p in dense.items()}
    assert relative_difference(logits(model), expected) <= 1e-6


class Large(TorchDispatchMode):
    """Counts the pieces of memory of a size at least that operations within the context ask for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            fresh = isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given
            self.made += fresh and tensor.untyped_storage().nbytes() >= self.size
        return made


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_makes_one_weight_of_a_stacks_size_and_one_gradient(packed):
    torch.manual_seed(0)
    mix = Mix()
    mix.up = nn.Parameter(torch.randn(4, 256, 128))
    model = randomize(inject(nn.Sequential(mix), "0.up", LoRAConfig(r=2)))
    if packed:
        quantize(model)
    x = torch.randn(2, 128, requires_grad=True)
    with Large(4 * 256 * 128 * 4) as large:
        model(x).sum().backward()
    assert large.made == 2


@pytest.mark.parametrize("packed", [False, True])
def test_in_groups_no_stack_is_copied_and_none_has_a_gradient(packed):
    """Of a stack's size are the weights that a base in few bits is made into, forwards and backwards; none is kept."""
    torch.manual_seed(0)
    wide = {**SMALL, "hidden_size": 64, "intermediate_size": 96}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **wide))
    adapted(model, 4)
    if packed:
        quantize(model)
    size, mine = 4 * 64 * 96 * 4, {p.data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []
    with Large(size) as large:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(TOKENS, labels=TOKENS).loss
        assert large.made == (2 * 2 if packed else 0)
        loss.backward()
    assert large.made == (2 * 2 * 2 - 1 if packed else 0)  # the input of the first has no gradient
    assert all(t.untyped_storage().nbytes() < size for t in kept if t.data_ptr() not in mine)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_else_reads_a_stack_in_groups_reads_the_adapted_weight():
    model = mixtral()
    adapted(model, 4)
    experts = next(module for module in model.modules() if isinstance(module, SplitExperts))
    changed = merge(copy.deepcopy(model)).get_submodule(model_path(model, experts))
    seen = {}

    def read(module, *_):
        w = module.gate_up_proj
        seen.update(shape=w.shape, dtype=w.dtype, device=w.device, norm=w.norm(), third=w[2], dim=w.dim())
        seen.update(swapped=torch.transpose(w.mT, 0, 1), product=torch.ones(1, 48) @ w, axes=w.transpose(0, 1))

    experts.base_module.register_forward_pre_hook(read)
    model(TOKENS)
    weight = changed.gate_up_proj
    assert (seen["shape"], seen["dtype"], seen["device"], seen["dim"]) == (weight.shape, weight.dtype, weight.device, 3)
    for found, expected in (
        (seen["norm"], weight.norm()),
        (seen["third"], weight[2]),
        (seen["swapped"], weight.mT.transpose(0, 1)),
        (seen["axes"], weight.transpose(0, 1)),
        (seen["product"], torch.ones(1, 48) @ weight),
    ):
        assert relative_difference(found, expected) <= 1e-6


def test_code_that_goes_through_the_experts_one_by_one_reads_a_stack_once(monkeypatch):
    """With gradients that a look at the weight without them does not take away."""
    model = mixtral()
    adapted(model, 4)
    experts = next(module for module in model.modules() if isinstance(module, SplitExperts))
    reads: list[nn.Module] = []
    monkeypatch.setattr(
        split_experts, "_read", lambda layer, read=split_experts._read: reads.append(layer) or read(layer)
    )
    found = []

    def loop(module, *_):
        with torch.no_grad():
            assert not module.gate_up_proj.norm().requires_grad
        found.extend(module.gate_up_proj[index] for index in range(4))

    experts.base_module.register_forward_pre_hook(loop)
    model(TOKENS)
    assert len(reads) == 2
    assert all(weight.requires_grad for weight in found)


def model_path(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_state_dict_reloads_strictly(packed):
    model, twin = adapted(mixtral()), inject(mixtral(), TARGETS, LoRAConfig(r=3, alpha=5))
    if packed:
        quantize(model)
        quantize(twin)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(twin.eval()), logits(model.eval()))


def test_a_second_adapter_stands_on_a_quantized_stack():
    model = quantize(inject(Products(), "mix.up", LoRAConfig(r=2)))
    randomize(inject(model, "mix.up", LoRAConfig(r=3), name="second"))
    assert model.mix.up.adapter("second").lora_A.shape == (4, 3, 16)
    assert isinstance(delete_adapter(delete_adapter(model, "second"), "default").mix, SplitExperts)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoRAConfig(r=2, dropout=0.1), "inputs of experts are out of reach.*dropout=0"),
        (LoRAConfig(r=13), "r=13 is more than the full rank 12 of a layer 16 -> 12"),
    ],
)
def test_what_experts_cannot_have_is_refused(config, said):
    model = Products()
    with pytest.raises(TargetError, match=said):
        inject(model, "mix.up", config)
    assert type(model.mix) is Mix


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8, 8))
        self.inner = nn.Linear(8, 8)


@pytest.mark.parametrize("build", [Block, lambda: nn.ConvTranspose1d(4, 4, 3)])
def test_other_parameters_of_three_axes_are_no_experts(build):
    model = nn.ModuleDict({"block": build(), "linear": nn.Linear(4, 4)})
    name = "table" if isinstance(model["block"], Block) else "weight"
    with pytest.raises(TargetError, match="matches no linear layer"):
        inject(model, f"block.{name}")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # between PEFT and transformers
@pytest.mark.parametrize("r", [3, 4])
@pytest.mark.parametrize("build", [mixtral, qwen3, gpt_oss])
def test_output_and_gradients_are_those_of_pefts_adapter_of_a_parameter(build, r):
    torch.manual_seed(0)
    model = build().eval()
    twin, before = copy.deepcopy(model), logits(model)
    adapted(model, r)
    config = peft.LoraConfig(r=r, lora_alpha=5, target_modules=[], target_parameters=TARGETS)
    theirs = peft.get_peft_model(twin, config).eval()
    wrappers = {}
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            base = name.removeprefix("base_model.model.").replace(".base_layer", "")
            wrappers[f"{base}.{module.parameter_name}"] = module
    layers = adapted_layers(model)
    assert wrappers.keys() == layers.keys()
    pairs = [(wrapper, layers[path].adapter("default")) for path, wrapper in wrappers.items()]
    for wrapper, adapter in pairs:
        with torch.no_grad():
            wrapper.lora_A["default"].weight.copy_(adapter.lora_A.flatten(0, 1))
            wrapper.lora_B["default"].weight.copy_(adapter.lora_B.permute(1, 2, 0).flatten(1))
    found, expected = logits(model), logits(theirs)
    assert relative_difference(expected, before) > 1e-3
    assert relative_difference(found, expected) <= 1e-5  # fp32, another order of summation
    probe = torch.randn_like(found)
    for output in (found, expected):
        (output * probe).sum().backward()
    for wrapper, adapter in pairs:
        lora_A, lora_B = adapter.lora_A.grad.flatten(0, 1), adapter.lora_B.grad.permute(1, 2, 0).flatten(1)
        assert relative_difference(lora_A, wrapper.lora_A["default"].weight.grad) <= 1e-5
        assert relative_difference(lora_B, wrapper.lora_B["default"].weight.grad) <= 1e-5
