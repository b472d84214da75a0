"""Which adapters compute and which are trained, and that switching them costs no compilation it need not."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    activate,
    adapter_parameters,
    disabled,
    inject,
    load_adapter,
    quantize,
    routed,
    save_adapter,
)
from tests.conftest import randomize, relative_difference


def two(net: nn.Module) -> nn.Module:
    for name in ("a", "b"):
        randomize(inject(net, config=LoRAConfig(r=4), name=name))
    return net


def trained(net: nn.Module, tokens: Tensor) -> set[str]:
    """The adapters that a backward pass gives gradients to."""
    net.zero_grad()
    net(tokens).sum().backward()
    assert all(".adapters." in name for name, p in net.named_parameters() if p.grad is not None)
    return {name.split(".")[-2] for name, p in net.named_parameters() if p.grad is not None}


def test_several_active_adapters_compute_the_sum_of_their_updates():
    model = two(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double())
    x = torch.randn(3, 8).double()
    base = activate(model)[0](x)
    apart = [activate(model, name)[0](x) - base for name in "ab"]
    assert relative_difference(activate(model, "a", "b")[0](x) - base, apart[0] + apart[1]) <= 1e-13


@pytest.mark.parametrize(
    ("names", "train", "expected"),
    [
        (("a", "b"), None, {"a", "b"}),
        (("a", "b"), "b", {"b"}),
        (("a", "b"), ["a", "b"], {"a", "b"}),
        (("b",), None, {"b"}),
    ],
)
def test_those_named_in_train_get_gradients_and_no_others(net, tokens, names, train, expected):
    activate(two(net), *names, train=train)
    assert trained(net, tokens) == expected
    assert {id(p) for p in adapter_parameters(net)} == {id(p) for p in net.parameters() if p.requires_grad}


def test_one_is_trained_on_top_of_another_that_stays_as_it_is(net, tokens):
    """The gradient of the trained one is that of the sum: it learns what the frozen one leaves."""
    activate(two(net.double()), "a", "b")(tokens).square().sum().backward()
    both = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    activate(net, "a", "b", train="b")(tokens).square().sum().backward()
    assert all(torch.equal(p.grad, both[name]) for name, p in net.named_parameters() if ".b." in name)


def test_adapters_are_used_without_being_trained(net, tokens):
    assert not activate(two(net), "a", train=())(tokens).requires_grad
    assert not list(adapter_parameters(net))


def test_an_adapter_that_would_not_compute_cannot_be_trained(net):
    two(net)
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match="train names a, which activate is not asked to let compute"):
        activate(net, "b", train="a")
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        activate(net, "b", "c", train="b")
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before


def test_one_adapter_named_twice_computes_once(net, tokens):
    expected = activate(two(net), "a")(tokens)
    assert torch.equal(activate(net, "a", "a")(tokens), expected)


def test_what_is_loaded_or_activated_while_disabled_computes_afterwards(net, tokens, tmp_path):
    """Also on layers that had no adapter before."""
    fresh = inject(copy.deepcopy(net), "up_proj", LoRAConfig(r=2), name="a")
    inject(net, {"q_proj": LoRAConfig(r=2), "up_proj": LoRAConfig(r=2)}, name="b")
    save_adapter(randomize(net), tmp_path / "b", "b")
    expected = net(tokens)
    with disabled(fresh):
        base = fresh(tokens)
        load_adapter(fresh, tmp_path / "b", "b")
        assert torch.equal(fresh(tokens), base)
        activate(fresh, "a")
        assert torch.equal(fresh(tokens), base)
        activate(fresh, "b")
    assert torch.equal(fresh(tokens), expected)
    assert not torch.equal(expected, base)


@pytest.fixture
def compiled(net):
    """A model with two adapters of one config, compiled, and a list that grows with each graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    yield torch.compile(two(net), backend=backend), graphs
    torch._dynamo.reset()


def test_switching_between_adapters_of_one_config_compiles_nothing(compiled, tokens):
    model, graphs = compiled
    for name in ("a", "b", "a", "b"):
        activate(model, name)
        assert relative_difference(model(tokens), model._orig_mod(tokens)) <= 1e-6
    assert len(graphs) == 1


def test_new_values_for_a_loaded_adapter_compile_nothing(compiled, tokens, tmp_path):
    model, graphs = compiled
    activate(model, "a")
    save_adapter(model, tmp_path / "b", "b")
    before = model(tokens)
    load_adapter(model, tmp_path / "b", "a")
    after = model(tokens)
    assert not torch.equal(before, after)
    assert relative_difference(after, activate(model._orig_mod, "b")(tokens)) <= 1e-6
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, where a graph ends
def test_a_compiled_model_is_routed_without_compiling_for_each_batch(compiled):
    model, graphs = compiled
    activate(model, "a", "b")
    tokens = torch.randint(16, (6, 10))
    draw = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(12):
        names = [["a", "b", None][i] for i in torch.randint(3, (6,), generator=draw)]
        with routed(model, names):
            assert relative_difference(model(tokens), model._orig_mod(tokens)) <= 1e-6
        counts.append(len(graphs))
    assert counts == counts[:1] * 12


def test_a_compiled_model_checks_the_rows_of_each_batch(compiled):
    model, _ = compiled
    for count in (6, 4):
        tokens = torch.randint(16, (count, 10))
        with routed(model._orig_mod, [None] * count):  # no layer ends the graph here
            model(tokens)
            with pytest.raises(AdapterError, match=f"{count} names were routed, but Net is called with a batch of 2"):
                model(tokens[:2])


def test_the_base_of_a_compiled_model_is_one_graph(compiled, tokens):
    model, graphs = compiled
    with disabled(model):
        model(tokens)
    assert len(graphs) == 1


def test_loading_over_nf4_keeps_the_base(net, tokens, tmp_path):
    quantize(two(net))
    save_adapter(net, tmp_path / "a", "a")
    with disabled(net):
        base = net(tokens)
        load_adapter(net, tmp_path / "a", "new")
        assert torch.equal(net(tokens), base)
    assert torch.equal(net(tokens), activate(net, "a")(tokens))
