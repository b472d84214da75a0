"""What happens once in a run: injecting, quantizing where the weights are or from the host, saving, merging."""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from peers.contender import Contender, Setting
from peers.machine import Machine
from peers.steps import Outcome, attempt, fill
from peers.workload import Workload, named_targets


class Handling(ABC):
    """Something done to a model that is made anew each time."""

    name: ClassVar[str]

    def measure(
        self, contender: Contender, workload: Workload, setting: Setting, machine: Machine, rounds: int
    ) -> Outcome:
        """Return lists of what was found in each round, by name."""
        reason = contender.unavailable(machine)
        if reason is not None:
            return {"skipped": reason}
        rows: list[Outcome] = []
        for _ in range(rounds):
            rows.append(attempt(partial(self.once, contender, workload, setting, machine)))
            machine.tidy()
            if "failed" in rows[-1]:
                return rows[-1]
        return {what: [row[what] for row in rows] for what in rows[0]}

    @abstractmethod
    def once(self, contender: Contender, workload: Workload, setting: Setting, machine: Machine) -> Outcome:
        """Do it."""


class InPlace(Handling):
    """Inject and quantize on the device the weights are on, save the adapter, merge: seconds of each."""

    name = "in place"

    def once(self, contender: Contender, workload: Workload, setting: Setting, machine: Machine) -> Outcome:
        model, found = made(workload, machine), {}
        acts = [("quantize", contender.quantize), ("inject", contender.inject)]
        for what, act in acts if contender.quantizes_first else acts[::-1]:
            if setting.base == "nf4" or what == "inject":
                start = time.perf_counter()
                model = act(model, workload, setting, machine.device)
                machine.wait()
                found[what] = time.perf_counter() - start
        fill(contender, model, setting)
        with tempfile.TemporaryDirectory() as folder:
            ends = {"save": lambda: contender.save(model, Path(folder)), "merge": lambda: contender.merge(model)}
            found |= {what: taken for what, act in ends.items() if (taken := _seconds(act, machine)) is not None}
        return found


class FromHost(Handling):
    """Quantize weights that are in memory of the host, layer by layer on the device: seconds, and the peak there."""

    name = "from the host"

    def once(self, contender: Contender, workload: Workload, setting: Setting, machine: Machine) -> Outcome:
        model = made(workload, machine)
        machine.on_host(model)
        largest = max(model.get_submodule(name).weight.nbytes for name in named_targets(model, workload))
        if not contender.quantizes_first:
            model = contender.inject(model, workload, setting, torch.device("cpu"))
        seconds: list[float | None] = []
        act = partial(contender.quantize, model, workload, setting, machine.device)
        there = machine.allocations(lambda: seconds.append(_seconds(act, machine)))
        return {"seconds": seconds[0], "size": there.kept, "peak": there.peak, "largest layer": largest}


def made(workload: Workload, machine: Machine) -> Any:
    """Return a frozen model that shares nothing."""
    torch.manual_seed(0)
    return workload.build(machine.device).requires_grad_(False)


def _seconds(act: Callable[[], object], machine: Machine) -> float | None:
    """How long it took; None for what a contender does not have."""
    machine.wait()
    start = time.perf_counter()
    try:
        act()
    except NotImplementedError:
        return None
    machine.wait()
    return time.perf_counter() - start
