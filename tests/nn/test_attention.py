"""``nn.MultiheadAttention`` with adapters on its projections computes what torch does with the changed weights."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, delete_adapter, disabled, inject, merge, quantize
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.attention import PROJECTIONS, SplitAttention
from tests.conftest import randomize, relative_difference

F64 = torch.float64
N, L, S, E, H = 3, 5, 7, 12, 4

SHAPES = {
    "packed": {},
    "packed, batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "inputs of three sizes": {"kdim": 10, "vdim": 6},
    "inputs of three sizes, batch first, without bias": {"kdim": 10, "vdim": 6, "batch_first": True, "bias": False},
    "further key and zero attention": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "further key, three sizes": {"add_bias_kv": True, "kdim": 10, "vdim": 6},
}
CALLS = {
    "as it is": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": "bool"},
    "padding, no weights": {"key_padding_mask": "bool", "need_weights": False},
    "padding in floats": {"key_padding_mask": "float", "attn_mask": "float"},
    "mask": {"attn_mask": "bool"},
    "mask of each head, no weights": {"attn_mask": "per head", "need_weights": False},
    "mask and padding": {"attn_mask": "per head", "key_padding_mask": "bool"},
    "causal": {"attn_mask": "causal", "is_causal": True, "need_weights": False},
    "causal, weights": {"attn_mask": "causal", "is_causal": True},
    "causal with padding": {
        "attn_mask": "causal",
        "is_causal": True,
        "key_padding_mask": "bool",
        "need_weights": False,
    },
}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def attention(**settings) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, H, dtype=F64, **settings)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer


def inputs(layer: nn.MultiheadAttention, *, batched: bool = True) -> list[torch.Tensor]:
    lengths, sizes = (L, S, S), (E, layer.kdim, layer.vdim)
    shapes = [(n, d) for n, d in zip(lengths, sizes, strict=True)]
    if batched:
        shapes = [(N, n, d) if layer.batch_first else (n, N, d) for n, d in shapes]
    return [drawn(*shape) for shape in shapes]


def masks(call: dict, *, batched: bool = True) -> dict:
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, -2:] = padding[1, -1:] = True
    padding = padding if batched else padding[0]
    made = {
        "key_padding_mask": {"bool": padding, "float": drawn(*padding.shape)},
        "attn_mask": {
            "bool": torch.rand(L, S) < 0.3,
            "float": drawn(L, S),
            "per head": torch.rand((N if batched else 1) * H, L, S) < 0.3,
            "causal": torch.ones(L, S, dtype=torch.bool).triu(1),
        },
    }
    for mask in (made["attn_mask"]["bool"], made["attn_mask"]["per head"]):
        mask[..., 0] = False  # no row is masked whole, which would be NaN
    return {key: made[key][value] if key in made else value for key, value in call.items()}


def adapted(layer: nn.Module, targets="*", r: int = 3) -> nn.Module:
    return randomize(inject(nn.ModuleList([layer]), targets, LoRAConfig(r=r, alpha=5)), std=0.3)


def dense(base: nn.MultiheadAttention, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """The weights ``W + s B A`` by torch's names, with gradients to the factors."""
    weights = dict(base.named_parameters())
    update = {name: 5 / 3 * B @ A for name, (A, B) in factors.items()}
    if base.in_proj_weight is not None:
        parts = [update.get(name, torch.zeros(E, E, dtype=F64)) for name in PROJECTIONS[:3]]
        weights["in_proj_weight"] = base.in_proj_weight.detach() + torch.cat(parts)
    else:
        for name in set(update) - {"out_proj"}:
            weights[f"{name}_weight"] = weights[f"{name}_weight"].detach() + update[name]
    if "out_proj" in update:
        weights["out_proj.weight"] = base.out_proj.weight.detach() + update["out_proj"]
    return weights


def factors_of(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    adapters = {path.split(".")[-1]: layer.adapter("default") for path, layer in adapted_layers(model).items()}
    return {name: (adapter.lora_A, adapter.lora_B) for name, adapter in adapters.items()}


def same(found, expected) -> bool:
    """The order of summation, in float64, is all that differs."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert [a is None for a in found] == [b is None for b in expected]
    return all(a.shape == b.shape and relative_difference(a, b) <= 1e-12 for a, b in pairs)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_it_computes_what_torch_does_with_the_changed_weights(settings, call):
    """Outputs, attention weights and gradients of factors and inputs, against torch's own module."""
    base = attention(**settings)
    model = adapted(copy.deepcopy(base))
    xs, call = [x.requires_grad_() for x in inputs(base)], masks(call)
    found = model[0](*xs, **call)
    mine = [p for pair in factors_of(model).values() for p in pair]
    copies = {n: tuple(p.detach().clone().requires_grad_() for p in pair) for n, pair in factors_of(model).items()}
    expected = torch.func.functional_call(base, dense(base, copies), tuple(xs), call)
    assert same(found, expected)
    probes = [None if y is None else torch.randn_like(y) for y in expected]
    gradients = [
        torch.autograd.grad(sum((y * p).sum() for y, p in zip(ys, probes, strict=True) if y is not None), [*wrt, *xs])
        for ys, wrt in ((found, mine), (expected, [p for pair in copies.values() for p in pair]))
    ]
    assert all((a - b).abs().max() <= 1e-11 * b.abs().max().clamp(1e-3) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("call", [CALLS["as it is"], CALLS["mask of each head, no weights"], CALLS["mask and padding"]])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequence_without_a_batch(batch_first, call):
    base = attention(batch_first=batch_first)
    model = adapted(copy.deepcopy(base))
    xs, call = inputs(base, batched=False), masks(call, batched=False)
    merged = merge(copy.deepcopy(model))
    assert same(model[0](*xs, **call), merged[0](*xs, **call))


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_dropout_draws_what_torch_draws(need_weights):
    model = adapted(attention(dropout=0.4, batch_first=True))
    merged = merge(copy.deepcopy(model)).train()
    x = drawn(N, L, E)
    torch.manual_seed(5)
    found = model[0](x, x, x, need_weights=need_weights)
    torch.manual_seed(5)
    assert same(found, merged[0](x, x, x, need_weights=need_weights))
    model.eval()
    merged.eval()
    assert same(model[0](x, x, x), merged[0](x, x, x))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_what_the_merged_module_gives(autocast, need_weights):
    stored = torch.float32 if autocast else torch.bfloat16
    model = randomize(inject(nn.ModuleList([attention(add_bias_kv=True).to(stored)]), "*", LoRAConfig(r=3)), std=0.1)
    merged = merge(copy.deepcopy(model))
    xs, call = [x.to(stored) for x in inputs(merged[0])], masks(CALLS["padding"]) | {"need_weights": need_weights}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = model[0](*xs, **call)[0], merged[0](*xs, **call)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_difference(found, expected) <= 2**-4  # 8 bits, through four products and a softmax


@pytest.mark.parametrize("target", [*PROJECTIONS, "[qv]_proj"])
def test_each_projection_by_choice(target):
    base = attention(batch_first=True)
    model = adapted(copy.deepcopy(base), target)
    names = {"[qv]_proj": ["q_proj", "v_proj"]}.get(target, [target])
    assert list(factors_of(model)) == names
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(names)
    xs = inputs(base)
    assert same(model[0](*xs), torch.func.functional_call(base, dense(base, factors_of(model)), tuple(xs)))


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_merging_gives_torchs_module_back_with_its_keys(settings):
    base = attention(**settings)
    keys, shapes = list(base.state_dict()), [p.shape for p in base.state_dict().values()]
    model = adapted(base)
    xs = inputs(base)
    expected = model[0](*xs)
    merge(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert type(model[0].out_proj) is type(nn.MultiheadAttention(2, 1).out_proj)
    assert list(model[0].state_dict()) == keys
    assert [p.shape for p in model[0].state_dict().values()] == shapes
    assert not any(p.requires_grad for p in model.parameters())
    assert same(model[0](*xs), expected)


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_deleting_the_last_adapter_gives_the_very_weights_back(settings):
    base = attention(**settings)
    before = copy.deepcopy(base.state_dict())
    model = inject(adapted(base, "[qk]_proj"), "v_proj", LoRAConfig(r=2), name="second")
    delete_adapter(model, "default")
    assert isinstance(model[0], SplitAttention)
    delete_adapter(model, "second")
    assert type(model[0]) is nn.MultiheadAttention
    assert list(model[0].state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model[0].state_dict().items())


def test_all_linear_reaches_attention_and_leaves_the_head():
    model = nn.Sequential(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), nn.Linear(E, 2))
    inject(model, config=LoRAConfig(r=2))
    assert list(adapted_layers(model)) == [
        *(f"0.self_attn.{name}" for name in PROJECTIONS),
        "0.linear1",
        "0.linear2",
    ]


def test_a_model_of_attention_alone_has_no_head_to_spare():
    model = inject(nn.ModuleDict({"attn": attention()}), config=LoRAConfig(r=2))
    assert list(adapted_layers(model)) == [f"attn.{name}" for name in PROJECTIONS]


def test_what_is_wrong_is_found_before_attention_is_touched():
    model = nn.ModuleList([attention(), nn.Linear(E, 2)])
    weight = model[0].in_proj_weight
    with pytest.raises(TargetError, match="r=5 is more than the full rank 2"):
        inject(model, {"q_proj": LoRAConfig(r=2), "1": LoRAConfig(r=5)})
    assert model[0].in_proj_weight is weight
    assert weight.requires_grad


def test_attention_as_the_whole_model_cannot_replace_itself():
    with pytest.raises(TargetError, match="cannot replace itself"):
        inject(attention(), "q_proj", LoRAConfig(r=2))


def test_tied_packed_weights_are_refused():
    model = nn.ModuleDict({"a": attention(), "b": attention()})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    with pytest.raises(TargetError, match=r"shares its weight with another layer \(a.in_proj_weight, b.in_proj_weight"):
        inject(model, "a.q_proj", LoRAConfig(r=2))


def test_an_attention_in_two_places_is_adapted_once():
    shared = attention()
    model = nn.ModuleDict({"a": shared, "b": shared})
    randomize(inject(model, "q_proj", LoRAConfig(r=2)))
    assert model["a"] is model["b"]
    merge(model)
    assert model["a"] is model["b"]
    assert type(model["a"]) is nn.MultiheadAttention


class Changed(nn.MultiheadAttention):
    def forward(self, *inputs, **settings):
        return super().forward(*inputs, **settings)


def parametrized() -> nn.Module:
    layer = attention()
    nn.utils.parametrizations.orthogonal(layer, "in_proj_weight")
    return layer


@pytest.mark.parametrize("build", [lambda: Changed(E, H), parametrized])
def test_attention_of_another_function_is_left_alone_and_refused(build):
    model = nn.ModuleDict({"attn": build(), "plain": nn.Linear(E, E), "head": nn.Linear(E, 2)})
    with pytest.raises(TargetError, match=r"it belongs to a changed nn\.MultiheadAttention"):
        inject(model, "out_proj", LoRAConfig(r=2))
    assert list(adapted_layers(inject(model, config=LoRAConfig(r=2)))) == ["plain"]


def test_the_attention_itself_is_no_target_and_the_error_says_what_is():
    with pytest.raises(TargetError, match=r"Pass 'attn\.\*' for the layers inside"):
        inject(nn.ModuleDict({"attn": attention()}), "attn")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(clone, packed):
    model = adapted(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True))
    model = quantize(model) if packed else model
    twin, x = clone(model), torch.randn(N, L, E)
    assert torch.equal(twin[0](x), model[0](x))
    assert list(merge(twin)[0].state_dict()) == list(nn.TransformerEncoderLayer(E, H, 16).state_dict())


@pytest.mark.parametrize("packed", [False, True])
def test_state_dict_reloads_strictly(packed):
    model = adapted(attention().float(), "[qv]_proj")
    twin = inject(nn.ModuleList([attention().float()]), "[qv]_proj", LoRAConfig(r=3, alpha=5))
    if packed:
        quantize(model)
        quantize(twin)
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(L, N, E)
    assert torch.equal(twin[0](x, x, x)[0], model[0](x, x, x)[0])


@pytest.mark.parametrize("settings", [{}, {"kdim": 10, "vdim": 6}])
def test_over_nf4_the_merged_module_is_the_trained_function(settings):
    base = attention(**settings).float()
    model = quantize(adapted(base, "[qv]_proj"))
    xs = [x.float() for x in inputs(base)]
    expected = model[0](*xs)
    merge(model)
    assert relative_difference(model[0](*xs)[0], expected[0]) <= 2e-6  # fp32, another order of summation


def test_quantizing_some_projections_frees_their_part_of_the_packed_weight():
    model = quantize(inject(nn.ModuleList([attention().float()]), "[qv]_proj", LoRAConfig(r=2)))
    stored = [p.untyped_storage().nbytes() for p in model[0].k_proj.parameters()]
    assert stored == [E * E * 4, E * 4]


def test_hooks_stay_with_the_attention():
    model = nn.ModuleList([attention()])
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("called"))
    adapted_model = adapted(model, "q_proj")
    x = drawn(L, N, E)
    for expected in (1, 2):
        adapted_model[0][0](x, x, x)
        assert len(seen) == expected
        merge(adapted_model) if expected == 1 else handle.remove()
    adapted_model[0][0](x, x, x)
    assert len(seen) == 2


def test_disabled_computes_the_base():
    base = attention()
    model = adapted(copy.deepcopy(base))
    xs = inputs(base)
    with disabled(model):
        assert same(model[0](*xs), base(*xs))


def test_other_dtypes_of_a_merge_reach_the_whole_attention():
    model = merge(adapted(attention(add_bias_kv=True), "q_proj"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"is_causal": True}, "attn_mask, which is None"),
        ({"attn_mask": torch.zeros(L, S + 1)}, r"attn_mask is torch.float32 of shape \(5, 8\), expected"),
        ({"key_padding_mask": torch.zeros(S, dtype=torch.bool)}, r"key_padding_mask is torch.bool of shape \(7,\)"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask is torch.int64"),
    ],
)
def test_masks_that_do_not_fit_are_named(call, said):
    model = adapted(attention())
    with pytest.raises(ValueError, match=said):
        model[0](*inputs(model[0]), **call)


def test_compiles_without_graph_breaks():
    model = adapted(attention(batch_first=True))
    x = drawn(N, L, E)
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    assert relative_difference(compiled(x, x, x, need_weights=False)[0], model[0](x, x, x)[0]) <= 1e-12


# Inside torch's own transformers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "[qv]_proj", "1.self_attn.*"])
def test_the_fused_evaluation_of_an_encoder_sees_the_adapters(targets, padded, quantized):
    """In evaluation, torch's encoder reads the weights and may turn a padded batch into a nested tensor."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = randomize(inject(nn.TransformerEncoder(layer, 2), targets, LoRAConfig(r=3)), std=0.2)
    model = quantize(model) if quantized else model
    x = torch.randn(N, L, 32)
    padding = torch.arange(L) >= torch.tensor([[5], [3], [4]])
    settings = {"src_key_padding_mask": padding} if padded else {}
    trained = model.train()(x, **settings)
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            evaluated = model.eval()(x, **settings)
        merged = merge(copy.deepcopy(model))(x, **settings)
    seen = ~padding if padded else torch.ones(N, L, dtype=torch.bool)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}
    assert relative_difference(evaluated[seen], trained[seen]) <= 1e-5  # fp32, fused kernels
    assert relative_difference(merged[seen], evaluated[seen]) <= 1e-5


def test_nested_tensors_outside_of_the_fused_evaluation_are_refused():
    """Gradients are asked for, which the fused path cannot give, and the first layer had made a nested tensor."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = inject(nn.TransformerEncoder(layer, 2), "1.self_attn.q_proj", LoRAConfig(r=3)).eval()
    padding = torch.arange(L) >= torch.tensor([[5], [3], [4]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match="enable_nested_tensor=False"):
            model(torch.randn(N, L, 32), src_key_padding_mask=padding)


def test_a_decoder_with_attention_to_another_sequence():
    """``nn.Transformer``: self-attention, causal self-attention and cross-attention, against the merged model."""
    model = nn.Transformer(E, 2, 1, 1, 16, dropout=0.0, batch_first=True, dtype=F64)
    model = randomize(inject(model, config=LoRAConfig(r=2)), std=0.3)
    assert sum("multihead_attn" in path for path in adapted_layers(model)) == 4
    source, target = drawn(N, S, E), drawn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=F64)
    expected = model(source, target, tgt_mask=mask, tgt_is_causal=True)
    found = merge(copy.deepcopy(model))(source, target, tgt_mask=mask, tgt_is_causal=True)
    assert relative_difference(found, expected) <= 1e-12
