"""One update for many parameters: the numbers of bitsandbytes, which updates them one by one."""

import copy
import io
import itertools
import pickle
from collections import Counter

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, OptimizerError, adapter_parameters, inject
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.runs import joining

UPDATES = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
SHAPES = [(16, 256), (300, 16), (7, 700), (5000,), (100,), (1,), (), (8, 100), (4, 8, 9, 16), (200, 200)]
"""Half of them with moments in 32 bits. Some fill no block, the last is updated alone on a CPU."""


class Updates(TorchDispatchMode):
    """Counts the updates of bitsandbytes by their names."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().removeprefix("bitsandbytes::")] += 1
        return func(*args, **(kwargs or {}))

    def of(self, step) -> dict[str, int]:
        self.calls.clear()
        with self:
            step()
        return {name: self.calls[name] for name in UPDATES if self.calls[name]}


def one_by_one(parameters, **settings) -> torch.optim.Optimizer:
    """The reference: the same in bitsandbytes."""
    optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)
    optimizer._cpu_paged_warned = True
    return optimizer


def seven_billion(width: int) -> nn.Module:
    """The linear layers of Llama-2-7B, narrower: 32 times four of d -> d, two of d -> 2.7 d and one of 2.7 d -> d."""
    wide = 11008 * width // 4096
    sizes = [(width, width)] * 4 + [(width, wide)] * 2 + [(wide, width)]
    layers = [nn.Linear(i, o, bias=False) for _ in range(32) for i, o in sizes]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def parameters_of(shapes, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def draw_gradients(*twins, keep=lambda index: True) -> None:
    """The same gradients for each set of parameters: some elements zero, as after clipping or a ReLU."""
    for index, same in enumerate(zip(*twins, strict=True)):
        gradient = torch.randn(same[0].shape) * (torch.rand(same[0].shape) > 0.3) if keep(index) else None
        for parameter in same:
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)


def assert_equal(ours, theirs) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_224_adapter_pairs_take_one_update_with_the_numbers_of_448():
    """As on all linear layers of a model of 7B parameters, a sixteenth as wide: no tensor is too small for 8 bits."""
    with torch.device("meta"):
        model = seven_billion(256)
    inject(model, config=LoRAConfig(r=16))
    shapes = [p.shape for p in adapter_parameters(model)]
    assert len(shapes) == 448
    ours = parameters_of(shapes)
    theirs = copy.deepcopy(ours)
    optimizer = FlatPagedAdamW8bit(ours, lr=1e-2, weight_decay=0.1)
    reference = one_by_one(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        draw_gradients(ours, theirs)
        assert Updates().of(optimizer.step) == {"optimizer_update_8bit_blockwise": 1}
        assert Updates().of(reference.step) == {"optimizer_update_8bit_blockwise": 448}
    assert_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_step_is_that_of_bitsandbytes_bit_for_bit(dtype):
    """Two groups, shapes that fill no block, transposed storage, and parameters that sit out steps of their own."""
    ours = parameters_of(SHAPES * 2, dtype)
    ours[1].data = ours[1].data.t().contiguous().t()
    theirs = copy.deepcopy(ours)
    half, settings = len(SHAPES), {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    groups = [[{"params": each[:half]}, {"params": each[half:], **settings}] for each in (ours, theirs)]
    optimizer, reference = FlatPagedAdamW8bit(groups[0], lr=1e-2), one_by_one(groups[1], lr=1e-2)
    for step in range(6):
        draw_gradients(ours, theirs, keep=lambda index, step=step: (index + step) % 5 != 1)
        optimizer.step()
        reference.step()
        optimizer.param_groups[1]["lr"] = reference.param_groups[1]["lr"] = 0.1 / (step + 2)
        assert_equal(ours, theirs)


def test_a_step_takes_one_update_for_each_group_and_kind_of_moments():
    parameters = parameters_of([(16, 300), (300, 16), (16,), (8, 8), (64, 64)])
    optimizer = FlatPagedAdamW8bit([{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.1}])
    draw_gradients(parameters)
    assert Updates().of(optimizer.step) == {"optimizer_update_8bit_blockwise": 2, "optimizer_update_32bit": 1}


def test_an_update_is_bounded_and_a_large_parameter_is_updated_in_place():
    """What is joined is copied, and on a CPU falls out of the cache."""
    limits = joining(torch.device("cpu"))
    count = limits.limit // 16000 + 1
    parameters = [*parameters_of([(limits.alone_from,)]), *(nn.Parameter(torch.zeros(1000, 16)) for _ in range(count))]
    optimizer = FlatPagedAdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    assert Updates().of(optimizer.step) == {"optimizer_update_8bit_blockwise": 1 + 2}


def test_a_parameter_without_a_gradient_is_passed_over():
    """No weight decay, no decay of moments, no step for its correction of the bias, as in torch."""
    parameters = parameters_of([(8, 8)] * 3)
    before = parameters[1].detach().clone()
    optimizer = FlatPagedAdamW8bit(parameters, weight_decay=0.5)
    draw_gradients(parameters, keep=lambda index: index != 1)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert list(optimizer.state_dict()["state"]) == [0, 2]
    draw_gradients(parameters)
    optimizer.step()
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [2, 1, 2]


def test_parameters_stay_the_tensors_they_are():
    """No views of a common buffer: whoever saves, moves, shares or measures one finds nothing unusual."""
    parameters = parameters_of([(16, 64)] * 20)
    places = [p.data_ptr() for p in parameters]
    optimizer = FlatPagedAdamW8bit(parameters)
    for _ in range(2):
        draw_gradients(parameters)
        optimizer.step()
    assert [p.data_ptr() for p in parameters] == places
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in parameters)


def test_what_happens_to_parameters_and_groups_between_steps_is_followed():
    """A new storage, another layout at the same place, a shorter one, a new group, a parameter less."""
    ours = parameters_of([(64, 64), (32, 32), (64, 64), (16, 16), (64, 64)])
    theirs, later = copy.deepcopy(ours), parameters_of([(32, 40), (64, 64)])
    later_theirs = copy.deepcopy(later)
    optimizer, reference = FlatPagedAdamW8bit(ours, lr=0.1), one_by_one(theirs, lr=0.1)

    def step(*twins):
        draw_gradients(*twins)
        optimizer.step()
        reference.step()
        assert_equal(*twins)

    step(ours, theirs)
    for each in (ours, theirs):
        each[0].data = each[0].data.clone()
    step(ours, theirs)
    for each in (ours, theirs):  # the moments go on in the order of the elements, as bitsandbytes makes it contiguous
        each[2].data = each[2].data.t()
    step(ours, theirs)
    for each, opt, new in ((ours, optimizer, later), (theirs, reference, later_theirs)):
        opt.add_param_group({"params": new, "lr": 0.01})
        del opt.param_groups[0]["params"][4]
        each[4:] = new
    step(ours, theirs)
    step(ours, theirs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_by_itself(duplicate):
    parameters = parameters_of(SHAPES)
    optimizer = FlatPagedAdamW8bit(parameters, names={p: str(p.shape) for p in parameters})
    draw_gradients(parameters)
    optimizer.step()
    twins, twin = duplicate((parameters, optimizer))
    kept = [p.detach().clone() for p in parameters]
    draw_gradients(parameters, twins)
    twin.step()
    assert_equal(parameters, kept)
    optimizer.step()
    assert_equal(parameters, twins)
    assert list(twin.state_dict()["state"]) == list(optimizer.state_dict()["state"])


# Saved and resumed


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def named(shapes, *, prefix="layer") -> dict[str, nn.Parameter]:
    return {f"{prefix}.{index}": p for index, p in enumerate(parameters_of(shapes))}


def over(parameters: dict[str, nn.Parameter], **settings) -> FlatPagedAdamW8bit:
    names = {p: name for name, p in parameters.items()}
    return FlatPagedAdamW8bit(list(parameters.values()), **settings, names=names)


def stepped(steps: int = 3) -> tuple[dict[str, nn.Parameter], FlatPagedAdamW8bit]:
    parameters = named(SHAPES)
    optimizer = over(parameters, lr=0.1, weight_decay=0.1)
    for step in range(steps):
        draw_gradients(list(parameters.values()), keep=lambda index, step=step: (index, step) != (2, 1))
        optimizer.step()
    return parameters, optimizer


def test_moments_are_saved_under_names_in_8_bits_and_without_padding():
    parameters, optimizer = stepped()
    state = through_a_file(optimizer.state_dict())
    assert list(state["state"]) == state["param_groups"][0]["params"] == list(parameters)
    for name, entry in state["state"].items():
        p, short = parameters[name], parameters[name].numel() < 4096
        assert {entry[key].dtype for key in ("state1", "state2")} == {torch.float32 if short else torch.uint8}
        assert entry["state1"].shape == entry["state2"].shape == p.shape
        assert short or len(entry["absmax1"]) == len(entry["absmax2"]) == -(-p.numel() // 256)
    assert [entry["step"] for entry in state["state"].values()] == [3, 3, 2, 3, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("reorder", [list, lambda items: list(reversed(items))], ids=["same order", "other order"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(reorder):
    """Also where the model names its parameters in another order, or has gone on meanwhile."""
    parameters, optimizer = stepped()
    resumed = dict(reorder([(name, nn.Parameter(p.detach().clone())) for name, p in parameters.items()]))
    other = over(resumed)
    for p in resumed.values():
        p.grad = torch.zeros_like(p)
    other.step()  # what it has meanwhile is replaced
    for name, p in resumed.items():
        p.data.copy_(parameters[name])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [other.param_groups[0][key] for key in ("lr", "weight_decay")] == [0.1, 0.1]
    for _ in range(3):
        draw_gradients(list(parameters.values()), [resumed[name] for name in parameters])
        optimizer.step()
        other.step()
    assert all(torch.equal(p, resumed[name]) for name, p in parameters.items())


def test_the_state_of_other_parameters_is_refused_by_name():
    _, optimizer = stepped()
    state = optimizer.state_dict()
    with pytest.raises(OptimizerError, match=r"group 0.*holds layer\.0, .*beyond.*lacks other\.0, "):
        over(named(SHAPES, prefix="other")).load_state_dict(state)
    with pytest.raises(OptimizerError, match=r"layer\.0 do not fit: state1 was saved as 4096 elements.*has 1024"):
        over(named([(4, 256), *SHAPES[1:]])).load_state_dict(state)
    with pytest.raises(OptimizerError, match="has 1 groups, this one 2"):
        FlatPagedAdamW8bit([{"params": parameters_of([(2, 2)])} for _ in range(2)]).load_state_dict(state)
    del state["state"]["layer.0"]["absmax2"]
    with pytest.raises(OptimizerError, match=r"layer\.0 do not fit: 'absmax2' is missing"):
        over(named(SHAPES)).load_state_dict(state)


def test_a_state_of_bitsandbytes_is_taken_up():
    """By position, as in checkpoints written before there was one buffer; it goes on bit for bit."""
    theirs = parameters_of(SHAPES)
    reference = one_by_one(theirs, lr=0.1)
    for _ in range(3):
        draw_gradients(theirs)
        reference.step()
    ours = copy.deepcopy(theirs)
    optimizer = over({f"layer.{index}": p for index, p in enumerate(ours)})
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    assert optimizer.param_groups[0].keys() == over(named(SHAPES)).param_groups[0].keys()
    for _ in range(2):
        draw_gradients(ours, theirs)
        optimizer.step()
        reference.step()
    assert_equal(ours, theirs)


def test_names_may_be_those_of_the_groups():
    parameters = named([(8, 8), (8, 4)])
    optimizer = FlatPagedAdamW8bit(list(parameters.items()))
    assert optimizer.state_dict()["param_groups"][0]["params"] == list(parameters)


# What every optimizer of torch does


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = FlatPagedAdamW8bit([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_gradients_are_reset_to_none_or_to_zeros_in_one_operation():
    parameters = parameters_of([(8, 8)] * 5)
    optimizer = FlatPagedAdamW8bit(parameters)
    draw_gradients(parameters)
    counted = Updates()
    counted.of(lambda: optimizer.zero_grad(set_to_none=False))
    assert {name for name in counted.calls if "zero" in name} == {"aten::_foreach_zero_"}
    assert all(p.grad.abs().sum() == 0 for p in parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_no_floating_point_numbers_are_refused(dtype):
    optimizer = FlatPagedAdamW8bit(parameters_of([(2, 2)]))
    with pytest.raises(OptimizerError, match=r"plain floating point tensors.*optimizer=None"):
        optimizer.add_param_group({"params": [torch.zeros(2, 2, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptimizerError, match=r"sparse gradient.*sparse=False"):
        FlatPagedAdamW8bit(table.parameters()).step()


def test_an_empty_parameter_does_no_harm():
    parameters = parameters_of([(64, 64), (0, 8), (64, 64)])
    optimizer = FlatPagedAdamW8bit(parameters)
    draw_gradients(parameters)
    assert Updates().of(optimizer.step) == {"optimizer_update_8bit_blockwise": 1}
    draw_gradients(parameters)
    assert Updates().of(optimizer.step) == {"optimizer_update_8bit_blockwise": 1}
    FlatPagedAdamW8bit(parameters).load_state_dict(optimizer.state_dict())
