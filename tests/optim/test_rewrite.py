"""The user's optimizers, narrowed to the adapters and swapped for the paged 8-bit AdamW."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_lora import OptimizerError, inject
from lightning_lora.optim.flat_adamw import FlatPagedAdamW8bit
from lightning_lora.optim.paged_adamw import PagedAdamW8bit
from lightning_lora.optim.report import optimizer_report
from lightning_lora.optim.rewrite import rewrite_optimizers

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 16)], milestones=[4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2),
}


def groups(net):
    adapters = [p for name, p in net.named_parameters() if "lora_" in name]
    rest = [p for name, p in net.named_parameters() if "lora_" not in name]
    return [
        {"params": rest[:3] + adapters[::2], "lr": 0.1, "weight_decay": 0.0},
        {"params": rest[3:] + adapters[1::2], "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ]


def rewrite(net, optimizer, *schedulers):
    return rewrite_optimizers(net, [optimizer], schedulers, swap=PagedAdamW8bit())[0]


def test_adamw_becomes_the_paged_8bit_adamw_over_exactly_the_adapters(net):
    inject(net, train="head")
    optimizer = rewrite(net, torch.optim.AdamW(groups(net)))
    assert type(optimizer) is FlatPagedAdamW8bit
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
    kept = [{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} for group in optimizer.param_groups]
    assert kept == [
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ]


def test_the_swapped_optimizer_takes_the_step_that_adamw_takes(net, tokens):
    """Small tensors keep 32-bit moments, so the first steps agree with torch up to rounding."""
    inject(net)
    twin = copy.deepcopy(net)
    optimizer, reference = rewrite(net, torch.optim.AdamW(groups(net))), torch.optim.AdamW(groups(twin))
    for _ in range(3):
        for model, stepper in ((net, optimizer), (twin, reference)):
            stepper.zero_grad()
            model(tokens).square().mean().backward()
            stepper.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)  # steps of 0.1: bitsandbytes divides in another order


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedules_follow_the_same_learning_rates_and_warn_of_nothing(net, make):
    inject(net)
    twin = copy.deepcopy(net)
    plain = torch.optim.AdamW(groups(twin))
    original = torch.optim.AdamW(groups(net))
    schedule, expected = make(original), make(plain)
    optimizer = rewrite(net, original, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(15):
            for stepper in (optimizer, plain):
                for group in stepper.param_groups:
                    for p in group["params"]:
                        p.grad = torch.zeros_like(p)
                stepper.step()
            for each in (schedule, expected):
                each.step(1.0) if isinstance(each, lr_scheduler.ReduceLROnPlateau) else each.step()
            found = [group["lr"] for group in optimizer.param_groups]
            assert found == [group["lr"] for group in plain.param_groups], f"step {step}"
    assert found != [0.1, 0.05]


def test_other_optimizers_keep_their_class_and_lose_the_frozen_parameters(net):
    inject(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    assert rewrite(net, sgd) is sgd
    assert all(p.requires_grad for group in sgd.param_groups for p in group["params"])


def test_without_the_swap_adamw_stays_and_is_narrowed(net):
    inject(net)
    adamw = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    assert rewrite_optimizers(net, [adamw], [], swap=None) == [adamw]
    assert [name for name in adamw.param_groups[0]["param_names"] if "lora_" not in name] == []
    assert len(adamw.param_groups[0]["params"]) == len(adamw.param_groups[0]["param_names"]) == 12


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda net: torch.optim.AdamW(net.embed.parameters()), r"holds no adapter.*self\.parameters\(\)"),
        (
            lambda net: torch.optim.AdamW(net.downs.parameters()),
            r"8 of 12 trainable parameters are in no optimizer.*lora_A",
        ),
        (lambda net: torch.optim.AdamW(net.parameters(), amsgrad=True), "amsgrad=True in group 0.*optimizer=None"),
        (lambda net: torch.optim.AdamW(net.parameters(), maximize=True), "maximize=True in group 0.*optimizer=None"),
        (lambda net: torch.optim.AdamW(net.parameters(), differentiable=True), "differentiable=True in group 0"),
        (lambda net: torch.optim.Adam(net.parameters(), weight_decay=0.1), "adds its weight_decay=0.1.*AdamW"),
    ],
)
def test_an_optimizer_that_would_train_something_else_is_refused(net, make, said):
    inject(net)
    with pytest.raises(OptimizerError, match=said):
        rewrite(net, make(net))


def test_an_optimizer_that_has_stepped_is_refused(net, tokens):
    inject(net)
    optimizer = torch.optim.AdamW(net.parameters())
    net(tokens).sum().backward()
    optimizer.step()
    with pytest.raises(OptimizerError, match="has stepped already; its moments would be lost"):
        rewrite(net, optimizer)


def test_the_report_before_the_first_step_is_what_the_state_then_is(net, tokens):
    """Of these tensors only those with 4096 elements or more get 8-bit moments, and on the CPU none is paged."""
    inject(net, train="downs.0")
    optimizer = rewrite(net, torch.optim.AdamW(net.parameters()))
    before = optimizer_report(optimizer)
    net(tokens).sum().backward()
    optimizer.step()
    after = optimizer_report(optimizer)
    assert (after.in_8bit, after.paged, after.tensors) == (before.in_8bit, before.paged, before.tensors)
    large = [p for p in net.parameters() if p.requires_grad and p.numel() >= 4096]
    assert len(large) == after.in_8bit == 1
    assert after.paged == 0
    assert before.state_bytes == 0
    # 32-bit moments take 8 bytes an element, 8-bit ones 2 with two float32 per 256; each tensor begins a block
    small = sum(-(-p.numel() // 256) * 256 for p in net.parameters() if p.requires_grad) - large[0].numel()
    assert after.state_bytes == 8 * small + 2 * large[0].numel() + 2 * 4 * large[0].numel() // 256
    assert str(after).startswith("lightning_lora.optim.FlatPagedAdamW8bit")


def test_a_scheduler_inside_a_users_own_scheduler_follows(net):
    """As the warm-up wrappers do that people pass around."""

    class Warmup(lr_scheduler.LRScheduler):
        def __init__(self, optimizer, after):
            self.after = after
            super().__init__(optimizer)

        def get_lr(self):
            return [group["lr"] for group in self.optimizer.param_groups]

        def step(self, epoch=None):
            if hasattr(self, "_last_lr"):  # not in the constructor
                self.after.step()
            self._last_lr = self.get_lr()

    inject(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
    scheduler = Warmup(optimizer, lr_scheduler.StepLR(optimizer, 1, 0.5))
    new = rewrite(net, optimizer, scheduler)
    before = new.param_groups[0]["lr"]
    new.step()
    scheduler.step()
    assert new.param_groups[0]["lr"] == before / 2


def test_lbfgs_steps_over_the_adapters_alone(net, tokens):
    inject(net)
    optimizer = rewrite(net, torch.optim.LBFGS(net.parameters(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = net(tokens).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    optimizer.state_dict()
    assert closure().item() < first


def test_hooks_registered_on_the_optimizer_go_on_and_can_be_removed(net, tokens):
    inject(net)
    original, calls = torch.optim.AdamW(net.parameters()), []
    handle = original.register_step_pre_hook(lambda *_: calls.append("step"))
    original.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer = rewrite(net, original)
    net(tokens).sum().backward()
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert calls == ["step"]
    assert optimizer.state_dict()["mine"] == 1
