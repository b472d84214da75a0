"""LoRA+: the factors ``B`` learn at a multiple of the rate of everything else, under every schedule."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_lora import AdapterError, DoRAConfig, LoRAFAConfig, OptimizerError, VeRAConfig, inject, param_groups
from lightning_lora.optim.paged_adamw import PagedAdamW8bit
from lightning_lora.optim.rewrite import rewrite_optimizers
from tests.optim.test_rewrite import SCHEDULERS

RATIO = 16.0
MORE = {
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.05], step_size_up=3, cycle_momentum=False),
    "plateau with a floor": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, min_lr=[0.02, 0.01]),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, [0.02, 0.03], anneal_epochs=4),
    "nested": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)], o), lr_scheduler.ConstantLR(o, 0.3, 2)], o
    ),
}


def factors(net: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for key, p in net.named_parameters() if key.endswith(name)]


def two_groups(net: nn.Module) -> list[dict]:
    adapters = [p for p in net.parameters() if p.requires_grad]
    return [{"params": adapters[:4], "lr": 0.1}, {"params": adapters[4:], "lr": 0.05}]


def rate_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float:
    return next(float(g["lr"]) for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@pytest.mark.parametrize("paged_8bit", [False, True])
@pytest.mark.parametrize("make", (SCHEDULERS | MORE).values(), ids=SCHEDULERS | MORE)
def test_b_follows_every_schedule_at_the_ratio(net, make, paged_8bit):
    inject(net)
    groups = two_groups(net)
    reference = torch.optim.AdamW([{**group, "params": list(group["params"])} for group in groups])
    expected = make(reference)
    original = torch.optim.AdamW(groups)
    schedule = make(original)
    swap = PagedAdamW8bit() if paged_8bit else None
    optimizer = rewrite_optimizers(net, [original], [schedule], swap=swap, lr_ratio=RATIO)[0]
    net(torch.randint(16, (2, 3))).square().mean().backward()
    for step in range(12):
        for parameter in factors(net, "lora_A"):
            assert rate_of(optimizer, parameter) == pytest.approx(rate_of(reference, parameter))
        for parameter in factors(net, "lora_B"):
            assert rate_of(optimizer, parameter) == pytest.approx(RATIO * rate_of(reference, parameter))
        for stepper in (optimizer, reference):
            stepper.step()
        for scheduler in (schedule, expected):
            scheduler.step(*([1.0 / (1 + step % 3)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def test_a_resumed_schedule_goes_on(net):
    """Both sides save a rate for each group; torch refuses states of another number of groups."""
    inject(net)

    def make():
        optimizer = torch.optim.AdamW(two_groups(net))
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return rewrite_optimizers(net, [optimizer], [schedule], swap=None, lr_ratio=RATIO)[0], schedule

    optimizer, schedule = make()
    for _ in range(3):
        optimizer.step()
        schedule.step()
    resumed, going_on = make()
    resumed.load_state_dict(optimizer.state_dict())
    going_on.load_state_dict(schedule.state_dict())
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    resumed.step()
    going_on.step()
    assert going_on.get_last_lr() == pytest.approx([0.1 * 0.9**4, 1.6 * 0.9**4, 0.05 * 0.9**4, 0.8 * 0.9**4])


def test_a_group_of_b_alone_is_sped_up_as_it_is(net):
    inject(net, config=LoRAFAConfig())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    rewrite_optimizers(net, [optimizer], [], swap=None, lr_ratio=RATIO)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1.6)]


def test_names_of_parameters_are_split_with_them(net):
    inject(net)
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=0.1)
    rewrite_optimizers(net, [optimizer], [], swap=None, lr_ratio=RATIO)
    names = {id(p): name for name, p in named}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert {name.rpartition(".")[2] for name in optimizer.param_groups[1]["param_names"]} == {"lora_B"}


def test_an_optimizer_with_one_group_by_nature_is_refused(net):
    inject(net)
    optimizer = torch.optim.LBFGS([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(OptimizerError, match="LBFGS has one learning rate"):
        rewrite_optimizers(net, [optimizer], [], swap=None, lr_ratio=RATIO)


def test_groups_hold_every_trained_parameter_once(net):
    inject(net, config=DoRAConfig(r=4), train="head")
    groups = {g["name"]: g for g in param_groups(net, lr=0.1, lr_ratio=RATIO, weight_decay=0.2)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "A": (0.1, 0.2),
        "B": (pytest.approx(1.6), 0.2),
        "others": (0.1, 0.2),
        "vectors": (0.1, 0.0),
    }
    assert groups["A"]["params"] == factors(net, "lora_A")
    assert groups["B"]["params"] == factors(net, "lora_B")
    assert groups["others"]["params"] == [net.head.weight]
    assert groups["vectors"]["params"] == [*factors(net, "lora_magnitude_vector"), net.head.bias]
    torch.optim.AdamW(list(groups.values()))


def test_a_method_without_b_has_no_such_group_and_no_ratio(net):
    inject(net, config=VeRAConfig(r=8))
    assert [group["name"] for group in param_groups(net, lr=0.1)] == ["vectors"]
    with pytest.raises(OptimizerError, match=r"lr_ratio=16 is for factors B .* adapters of vera have none"):
        param_groups(net, lr=0.1, lr_ratio=RATIO)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": math.inf}, {"lr": 0.1, "lr_ratio": -1}])
def test_rates_out_of_range_are_refused(net, settings):
    with pytest.raises(ValueError, match="must be finite and above 0"):
        param_groups(inject(net), **settings)


def test_a_model_without_adapters_has_no_groups(net):
    with pytest.raises(AdapterError, match="has no adapters"):
        param_groups(net, lr=0.1)
