"""An adapted linear layer as two autograd nodes: what it computes, what it keeps, and where it stands aside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, LoRAFAConfig, inject, quantize
from lightning_lora.nn import dropout
from lightning_lora.nn.base import dense_weight
from tests.conftest import randomize, relative_difference

IN, OUT, R, ALPHA = 64, 48, 4, 6.0
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def adapted(
    dtype: torch.dtype = F64, *, packed: bool = False, bias: bool = True, config=LoRAConfig, **settings
) -> nn.Module:
    """One adapted layer whose adapter changes it; in a model, as ``inject`` and ``quantize`` want."""
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype)), "0", config(r=R, alpha=ALPHA, **settings))
    return randomize(quantize(model) if packed else model, std=0.3)[0].train()


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    adapter = layer.adapter("default")
    return adapter.lora_A, adapter.lora_B


def composed(layer: nn.Module, x: Tensor) -> Tensor:
    """The same of torch's own operations: what every other kind of layer does."""
    return layer.adapter("default")(x, layer.base_layer(x), layer.base_layer)


def nodes(y: Tensor) -> set[str]:
    """The names of all nodes that lead to ``y``."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo += [parent for parent, _ in node.next_functions]
    return found


def is_split(y: Tensor) -> bool:
    return "_OntoBackward" in nodes(y)


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    y = run(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in parameters)]


# ---- what it computes


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN), (0, IN), (2, 0, IN)])
def test_output_and_gradients_are_those_of_the_dense_formula(shape, bias, packed, p):
    layer = adapted(packed=packed, bias=bias, dropout=p)
    A, B = factors(layer)
    x = torch.randn(*shape, dtype=F64)
    torch.manual_seed(5)
    keep = dropout.kept(dropout.draw_seed(), x.shape, p, F64, x.device) / (1 - p) if p else torch.ones_like(x)
    W, b = dense_weight(layer.base_layer, F64), layer.bias

    def formula(x: Tensor) -> Tensor:
        return F.linear(x, W, b) + ALPHA / R * (x * keep) @ (B @ A).T

    torch.manual_seed(5)
    found, expected = gradients(layer, x, A, B), gradients(formula, x, A, B)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=0, atol=1e-11)  # float64: sums of up to 64 products of order 10


def test_it_is_two_nodes():
    layer = adapted(F32)
    assert is_split(layer(torch.randn(3, IN)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_is_differentiable_twice(p):
    layer = adapted(dropout=p)
    A, B = factors(layer)
    x = torch.randn(2, 3, IN, dtype=F64, requires_grad=True)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return layer(x)

    assert torch.autograd.gradcheck(run, (x, A, B), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, A, B), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_gradients_are_as_near_as_those_of_composed_operations(packed):
    layer = adapted(BF16, packed=packed)
    A, B = factors(layer)
    x = torch.randn(5, 7, IN, dtype=BF16)
    found, peer = gradients(layer, x, A, B), gradients(lambda x: composed(layer, x), x, A, B)
    assert [t.dtype for t in found] == [BF16, BF16, F32, F32]
    W, b = dense_weight(layer.base_layer, BF16).double(), layer.bias.double()
    A64, B64 = (t.detach().double().requires_grad_() for t in (A, B))

    def formula(x: Tensor) -> Tensor:
        return F.linear(x, W, b) + ALPHA / R * x @ A64.T @ B64.T

    for got, composite, exact in zip(found, peer, gradients(formula, x.double(), A64, B64), strict=True):
        assert relative_difference(got.double(), exact) <= 2**-6  # four roundings of 2^-8 each
        assert relative_difference(got.double(), exact) <= 1.5 * relative_difference(composite.double(), exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("given", [F32, BF16])
def test_autocast_computes_in_its_dtype_and_keeps_x_as_it_is(dtype, given):
    layer = adapted(dtype)
    A, B = factors(layer)
    x = torch.randn(4, IN).to(given)

    def run(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def inner(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return forward(x)

        return inner

    found = gradients(run(layer), x, A, B)
    assert is_split(run(layer)(x))
    assert found[0].dtype == BF16
    for got, want in zip(found, gradients(run(lambda x: composed(layer, x)), x, A, B), strict=True):
        assert got.dtype == want.dtype
        assert relative_difference(got.float(), want.float()) <= 2**-6


def test_a_backward_pass_under_autocast_computes_what_the_forward_pass_did():
    layer, x = adapted(F32), torch.randn(3, IN, requires_grad=True)
    expected = gradients(layer, x, *factors(layer))
    y = layer(x)
    x.grad = None
    with torch.autocast("cpu", dtype=BF16):
        y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    assert torch.equal(x.grad, expected[1])


def test_a_gradient_reaches_what_wants_one_and_nothing_else():
    layer = adapted(F32)
    A, B = factors(layer)
    layer.bias.requires_grad_()
    layer(torch.randn(3, IN)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 3.0))
    assert A.grad.any()
    A.grad = None
    B.requires_grad_(False)
    layer(torch.randn(3, IN)).sum().backward()
    assert A.grad.any()
    assert layer.base_layer.weight.grad is None


# ---- what it keeps


def kept_for_backward(layers: list[nn.Module], x: Tensor, autocast: bool = False) -> dict[int, int]:
    """Bytes of each storage that autograd keeps, by its address, without parameters and buffers."""
    held = {t.untyped_storage().data_ptr() for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=BF16, enabled=autocast):
        outputs = [layer(x) for layer in layers]
    sum(y.sum() for y in outputs).backward()
    return saved


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(
    ("dtype", "packed", "autocast"),
    [(F32, False, False), (BF16, False, False), (BF16, True, False), (F32, True, False), (F32, False, True)],
    ids=["fp32", "bf16", "nf4 bf16", "nf4 fp32", "fp32 under autocast"],
)
def test_three_layers_of_one_x_keep_x_once_and_r_numbers_a_row(dtype, packed, autocast, p):
    """No mask, no dropped or cast copy of ``x``, no cast copy of a weight: eight bytes of a seed."""
    layers = [adapted(dtype, packed=packed, dropout=p) for _ in range(3)]
    x = torch.randn(128, IN, dtype=dtype, requires_grad=True)
    saved = kept_for_backward(layers, x, autocast)
    assert saved.pop(x.untyped_storage().data_ptr()) == x.nbytes
    computed = BF16 if autocast else dtype
    expected = 3 * [128 * R * computed.itemsize] + (3 * [8] if p else [])
    assert sorted(saved.values()) == sorted(expected)


def test_nothing_is_kept_where_no_gradient_is_recorded():
    layer, x = adapted(F32), torch.randn(3, IN)
    expected = layer.eval()(x).detach()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = layer(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


class GatedMLP(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 192) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_a_checkpointed_block_stops_before_its_last_product(packed, p):
    """Two of three frozen products, and all small ones but ``B (A x)`` of the last: 0.69 of the forward pass."""
    model = inject(GatedMLP(), "*", LoRAConfig(r=2, dropout=p))
    model = randomize(quantize(model) if packed else model).train()
    x = torch.randn(32, 64, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(forward: Callable[[Tensor], Tensor]) -> tuple[int, list[Tensor]]:
        torch.manual_seed(4)
        with FlopCounterMode(display=False) as counter:
            found = gradients(forward, x, *trained)
        return counter.get_total_flops(), found

    with FlopCounterMode(display=False) as forward_alone:
        model(x)
    plain, expected = run(model)
    checkpointed, found = run(lambda x: checkpoint(model, x, use_reentrant=False))
    assert (checkpointed - plain) / forward_alone.get_total_flops() <= 0.7
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- where something else is asked for


@pytest.mark.parametrize("which", ["lora_A", "lora_B", "weight"])
def test_a_weight_that_changed_between_the_passes_is_refused(which):
    layer = adapted(F32)
    y = layer(torch.randn(3, IN, requires_grad=True))
    weights = dict(zip(("lora_A", "lora_B"), factors(layer), strict=True)) | {"weight": layer.base_layer.weight}
    with torch.no_grad():
        weights[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*between the forward and the backward"):
        y.sum().backward()


def test_hooks_on_the_layer_below_and_on_the_adapter_are_called():
    layer, x = adapted(F32), torch.randn(3, IN)
    expected = layer(x)
    for module in (layer.base_layer, layer.adapter("default")):
        seen = []
        handle = module.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        found = layer(x)
        handle.remove()
        assert len(seen) == 1
        assert not is_split(found)
        assert torch.allclose(found, expected, atol=1e-5)  # float32, sums of 64 products
        assert is_split(layer(x))


def test_a_trained_base_weight_gets_its_gradient():
    layer, x = adapted(F64), torch.randn(3, IN, dtype=F64)
    layer.base_layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(layer.base_layer.weight.grad, x.sum(0).expand(OUT, IN))


def test_a_frozen_down_projection_keeps_no_x():
    layer = adapted(F32, config=LoRAFAConfig, bias=False)
    x = torch.randn(128, IN, requires_grad=True)
    assert x.untyped_storage().data_ptr() not in kept_for_backward([layer], x)


def test_a_device_without_a_mask_source_drops_out_as_torch_does(monkeypatch):
    monkeypatch.setattr(dropout, "_SOURCES", {})
    layer = adapted(F64, dropout=0.3)
    A, B = factors(layer)
    x = torch.randn(4, IN, dtype=F64)

    def formula(x: Tensor) -> Tensor:
        return layer.base_layer(x) + ALPHA / R * F.dropout(x, 0.3) @ A.T @ B.T

    torch.manual_seed(2)
    expected = gradients(formula, x, A, B)
    torch.manual_seed(2)
    found = gradients(layer, x, A, B)
    assert is_split(layer(x))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, the first time
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_function_transforms_see_torchs_own_operations(p):
    layer = adapted(F64, dropout=p).eval()
    x, v = torch.randn(2, 5, IN, dtype=F64)
    W = layer.weight
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x))
    parameters = dict(layer.named_parameters())
    grads = torch.func.grad(lambda ps: torch.func.functional_call(layer, ps, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is None or torch.allclose(grads[name], parameter.grad)
    assert torch.allclose(torch.func.jvp(layer, (x,), (v,))[1], v @ W.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, v @ W.T)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_it_is_traced():
    layer, x = adapted(F32).eval(), torch.randn(3, IN)
    with torch.no_grad():
        assert torch.allclose(torch.jit.trace(layer, x)(x), layer(x), atol=1e-5)  # float32, sums of 64 products


@pytest.fixture
def graphs():
    """A backend that runs what it is given as it is, and a list that grows with each graph."""
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph

    torch._dynamo.reset()
    yield backend, found
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, about the second layer's x
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equal_layers_are_compiled_once_and_without_breaks(graphs, p):
    backend, found = graphs
    model = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(4)))
    randomize(inject(model, "*", LoRAConfig(r=R, dropout=p)), std=0.3).train()
    x = torch.randn(3, IN)
    expected = gradients(model, x, *factors(model[0]))
    for layer in model:
        layer.compile(backend=backend, fullgraph=True)
    compiled = gradients(model, x, *factors(model[0]))
    assert len(found) == 1
    for got, want in zip(compiled, expected, strict=True):
        assert p > 0 or relative_difference(got, want) <= 1e-5  # float32, sums of 64 products; masks are others
