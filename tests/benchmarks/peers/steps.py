"""One scenario measured: the contenders built around the same weights, compared, counted and timed in turns."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timing import interleaved
from torch import nn

from peers.by_peft import Peft
from peers.contender import Contender, Setting
from peers.machine import Machine, held
from peers.scenario import Scenario
from peers.workload import Batch, Workload

NORM = 2**-5
"""How far the norm of the gradient may be from PEFT's, relative to it: thousands of values that went through a hundred
roundings of ``2^-8``, which mostly cancel."""

OTHER_LOSS, OTHER_NORM = 2**-5, 2**-3
"""The same over frozen weights that are other numbers: NF4 errs by a tenth of a weight, and no two errors are alike."""

Outcome = dict[str, Any]
"""What is known of one contender: figures by name; or ``skipped``, or ``failed``, with the reason."""


@dataclass
class Runner:
    """A contender that was built, with what is called in each step."""

    contender: Contender
    model: nn.Module
    workload: Workload
    batch: Batch

    @property
    def trained(self) -> list[nn.Parameter]:
        return list(itertools.chain.from_iterable(self.contender.factors(self.model).values()))

    def forward(self) -> torch.Tensor:
        return self.contender.loss(self.workload, self.model, self.batch)

    def step(self) -> None:
        self.clear()
        self.forward().backward()

    def clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


def measure(scenario: Scenario, model: Any, machine: Machine, rounds: int) -> dict[str, Outcome]:
    """Return what is found of each contender, by name.

    Args:
        scenario: What is measured.
        model: The workload's, frozen; each contender is built around its parameters, which stay as they are.
        machine: Where.
        rounds: How often each is timed.
    """
    torch._dynamo.config.recompile_limit = 64  # each contender has blocks of its own kind
    torch.compiler.reset()  # graphs of contenders that are gone count towards what may be compiled
    torch.manual_seed(1)
    batch = scenario.workload.batch(machine.device)
    outcomes: dict[str, Outcome] = {}
    runners: dict[str, Runner] = {}
    for contender in scenario.contenders:
        found = outcomes[contender.name] = attempt(partial(_prepare, contender, scenario, model, batch, machine))
        runner = found.pop("runner", None)
        if runner is not None:
            runners[contender.name] = runner
    _compare(runners, outcomes, scenario)
    runners = {name: runner for name, runner in runners.items() if "failed" not in outcomes[name]}
    for name, runner in list(runners.items()):
        found = attempt(partial(_count, runner, machine))
        outcomes[name] |= found
        if "failed" in found:
            del runners[name]
        machine.tidy()
    acts: dict[str, Callable[[], None]] = {}
    for name, runner in runners.items():
        found = attempt(partial(_acts, runner, machine))
        outcomes[name] |= {what: found[what] for what in found if what == "failed"}
        acts |= {f"{name}\n{what}": act for what, act in found.items() if what != "failed"}
    for key, seconds in interleaved(acts, rounds, machine.clock(), warm_up=machine.warm_up).items():
        name, what = key.split("\n")
        outcomes[name][what] = seconds
    return outcomes


def attempt(act: Callable[[], Outcome]) -> Outcome:
    """Return what was found, or why nothing was: one contender's failure leaves the others to be measured."""
    try:
        return act()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"}


def _prepare(contender: Contender, scenario: Scenario, model: Any, batch: Batch, machine: Machine) -> Outcome:
    """Build a contender, and take its loss and the norm of its gradient."""
    reason = contender.unavailable(machine)
    if reason is not None:
        return {"skipped": reason}
    own = sharing(model)
    own.enable_input_require_grads()  # the first layer's input has a gradient, as if there were layers before
    if scenario.setting.checkpointing:
        own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    built = contender.build(own, scenario.workload, scenario.setting, machine)
    fill(contender, built, scenario.setting)
    runner = Runner(contender, built, scenario.workload, batch)
    return {"runner": runner, **loss_and_norm(runner, scenario.setting)}


def sharing(model: Any) -> Any:
    """Return modules of their own around the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def fill(contender: Contender, model: nn.Module, setting: Setting) -> None:
    """Give every contender the same adapters, whose update is about half as large as a weight drawn with std 0.02."""
    generator = torch.Generator().manual_seed(2)
    for _, (A, B) in sorted(contender.factors(model).items()):
        inputs = A.shape[1]
        up = 0.01 * math.sqrt(inputs) * setting.r / (setting.alpha * math.sqrt(setting.r))
        A.copy_(torch.randn(A.shape, generator=generator) / math.sqrt(inputs))
        B.copy_(torch.randn(B.shape, generator=generator) * up)


def loss_and_norm(runner: Runner, setting: Setting) -> Outcome:
    """Take them where nothing drops out: there the contenders compute one function."""
    runner.model.train(not setting.dropout)
    runner.clear()
    loss = runner.forward()
    loss.backward()
    gradients = [parameter.grad for parameter in runner.trained]
    missing = sum(gradient is None for gradient in gradients)
    if missing:
        raise RuntimeError(f"{missing} of {len(gradients)} adapter tensors got no gradient")
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    runner.clear()
    runner.model.train()
    return {"loss": loss.item(), "norm": torch.stack(norms).norm().item() if norms else math.nan}


def _compare(runners: dict[str, Runner], outcomes: dict[str, Outcome], scenario: Scenario) -> None:
    """Hold loss and norm of all that have adapters to those of the first of them, which is PEFT's."""
    adapted = [name for name, runner in runners.items() if runner.trained]
    for name in adapted:
        found, reference = outcomes[name], outcomes[adapted[0]]
        if not isinstance(runners[adapted[0]].contender, Peft):
            found["failed"] = "PEFT is not there to compare with; not timed"
            continue
        other = scenario.setting.base in runners[name].contender.unlike
        limits = (OTHER_LOSS, OTHER_NORM) if other else (scenario.workload.loss_tolerance, NORM)
        for what, limit in zip(("loss", "norm"), limits, strict=True):
            error = found[what] / reference[what] - 1
            found[f"{what} off"] = error
            if not abs(error) <= limit:
                of = "the loss" if what == "loss" else "the norm of the gradient"
                found["failed"] = f"{of} is {error:+.2e} of that of {adapted[0]}, limit {limit:.1e}; not timed"


def _count(runner: Runner, machine: Machine) -> Outcome:
    memory = machine.step_memory(runner.forward, runner.step)
    tensors = [*runner.model.parameters(), *runner.model.buffers()]
    weights = held(tensors)
    return {"weights": weights, "saved": memory.saved, "peak": weights + memory.peak}


def _acts(runner: Runner, machine: Machine) -> dict[str, Callable[[], None]]:
    """What is timed: a forward and backward pass, and each optimizer; each was called once."""
    acts = {"step": runner.contender.step(runner.step, machine)}
    if runner.trained:
        kinds = runner.contender.optimizers(machine)
        acts |= {kind: optimizer(runner.trained).step for kind, optimizer in kinds.items()}
    acts = {what: machine.finished(act) for what, act in acts.items()}
    for act in acts.values():
        act()
    return acts
