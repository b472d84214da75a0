"""Whole training steps beside the peers', in one process: one command, one table for each workload and setting.

Contenders are PEFT as it comes (adapters in fp32), PEFT with adapters in bf16, this library, torchtune's layers, and
the frozen model without adapters: the floor. Where nothing drops out and nothing is recomputed, PEFT and this library
run under torch.compile too; on a GPU with few tokens also as a CUDA graph; under checkpointing also with the loss in
chunks. Each is built around the same weights, gets the same adapters and the same batch, and takes its turn in each
round. Before anything is timed, its loss and the norm of its gradient are held to those of PEFT; who computes something
else is not timed, and the command ends with an error.

  --device cpu    a decoder of 4 layers of 1024, one of 2 layers of 2048, and a vision transformer
  --device cuda   Llama-2-7B's shape, 4x1024 and 1x512 tokens, and a larger vision transformer; weights are drawn there
  --rehearse      every scenario of the device at the sizes of a toy, on the CPU: does all of it run?

Figures are added to what --json holds already, so that a run may be made in parts (--only), and are written after each
scenario.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import claims, steps
from peers.claims import of_handling
from peers.contender import Setting
from peers.document import Document, Table, handling_report, step_report
from peers.handling import FromHost, Handling, InPlace
from peers.machine import Cpu, Cuda, Machine, Rehearsal
from peers.scenario import ADAPTING, CPU, CUDA, LARGE, QUANTIZING, SHORT, STACK, TRANSFORMER, Scenario, toy
from peers.workload import Workload
from report import Claim, Report, environment, parser

OPTIONAL = ("torchtune", "torchao", "triton")
NOTE = """A ratio is the median over the rounds of two contenders' times in the same round; *x floor* of PEFT's default
is the most that *PEFT default / this* could be. *forward + backward* starts without gradients. *8-bit AdamW* is paged:
of this library over all adapters at once, of the others bitsandbytes' tensor by tensor; *fused AdamW* is torch's.
*tokens/s* is of a whole step with the former. *peak* is the model's own bytes and the most that a forward and backward
pass allocates beyond them; moments of optimizers are not in it. *saved* is what is still allocated after the forward
pass. *loss off* and *gradient norm off* are relative to PEFT's default. The floor is dense in bf16, whatever the others
store; *floor and products* then makes the six products of each adapter by themselves, without graph, mask or cast: what
nothing can pass that multiplies with torch's products."""


@dataclass(frozen=True)
class Plan:
    """What runs where, and what is claimed of it."""

    machine: Machine
    scenarios: Sequence[Scenario]
    handlings: Sequence[tuple[Handling, Workload, Setting]]
    claims: Callable[[Document], list[Claim]]

    def names(self) -> list[str]:
        """What tables are called."""
        return [*map(str, self.scenarios), *(of_handling(w, setting, type(h)) for h, w, setting in self.handlings)]


def planned(device: str, *, rehearse: bool, layers: int | None) -> Plan:
    """Return the plan of a device, at the sizes of a toy if it is rehearsed."""
    sized = toy if rehearse else lambda workload: cut(workload, layers)
    found = [replace(its, workload=sized(its.workload)) for its in (CUDA if device == "cuda" else CPU)]
    machine: Machine = Rehearsal() if rehearse else Cuda() if device == "cuda" else Cpu()
    first = sized(LARGE if device == "cuda" else STACK)
    handlings: list[tuple[Handling, Workload, Setting]] = [
        (InPlace(), first, Setting(base)) for base in ("bf16", "nf4")
    ]
    if device == "cuda":
        handlings.append((FromHost(), first, Setting("nf4")))
        return Plan(machine, found, handlings, lambda document: claims.on_cuda(document, first, sized(SHORT)))
    transformer = sized(TRANSFORMER)
    others = [its for its in found if its.workload != transformer]
    return Plan(machine, found, handlings, lambda document: claims.on_cpu(document, transformer, others))


def cut(workload: Workload, layers: int | None) -> Workload:
    """Return the workload with fewer layers."""
    shape: Any = workload.shape
    return workload if layers is None else replace(workload, shape=replace(shape, layers=layers))  # type: ignore[type-var]


def carry_out(plan: Plan, document: Document, chosen: Callable[[str], bool], rounds: int) -> Iterator[Report]:
    """Measure what was chosen, and yield the report of each scenario once it is in the document."""
    model, shape = None, None
    for scenario in plan.scenarios:
        if not chosen(str(scenario)):
            continue
        if shape != scenario.workload.shape:
            model, shape = None, scenario.workload.shape
            plan.machine.tidy()
            torch.manual_seed(0)
            model = scenario.workload.build(plan.machine.device).requires_grad_(False)
        table = Table(scenario.workload.tokens, steps.measure(scenario, model, plan.machine, rounds))
        document.steps[str(scenario)] = table
        yield step_report(document, str(scenario))
    model = None
    plan.machine.tidy()
    for handling, workload, setting in plan.handlings:
        name = of_handling(workload, setting, type(handling))
        if chosen(name):
            taken = {
                contender.name: handling.measure(contender, workload, setting, plan.machine, min(rounds, 3))
                for contender in (ADAPTING if isinstance(handling, InPlace) else QUANTIZING)
            }
            document.handling[name] = Table(0, taken)
            yield handling_report(document, name)


def page(document: Document, found: list[Claim], device: str) -> str:
    """The figures as a page of the documentation."""
    where = "\n".join(f"- {name}: {value}" for name, value in document.environment.items())
    reports = [step_report(document, name) for name in document.steps]
    reports += [handling_report(document, name) for name in document.handling]
    tables = [report.markdown().replace(f"`{report.command}`\n\n", "").rstrip() for report in reports]
    troubles = [f"- {trouble}" for trouble in dict.fromkeys(document.troubles())]
    return (
        "\n\n".join(
            [
                f"# Beside the peers on {'a GPU' if device == 'cuda' else 'a CPU'}",
                f"`{document.command}`",
                where,
                NOTE,
                "## Claims",
                "\n".join(f"- {claim}" for claim in found),
                *(["## Not measured", "\n".join(troubles)] if troubles else []),
                *tables,
            ]
        )
        + "\n"
    )


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, repeats=8)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rehearse", action="store_true", help="all of it at the sizes of a toy, on the CPU")
    made.add_argument("--layers", type=int, metavar="N", help="of every model, in place of its own")
    made.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="scenarios by name, as tables show it")
    made.add_argument("--list", action="store_true", help="name the scenarios, and do nothing")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables here")
    given = made.parse_args(words)
    if given.device == "cuda" and not given.rehearse and not torch.cuda.is_available():
        made.error("--device cuda needs a CUDA device, and torch finds none; --rehearse does without")
    return given


def begun(given: argparse.Namespace, machine: Machine) -> Document:
    """Return the document that is added to: that of --json if there is one, of the same machine and versions."""
    installed = {each.name: each.version for each in metadata.distributions()}
    versions = {name: installed.get(name, "not installed") for name in OPTIONAL}
    here = environment() | versions | machine.describe()
    if given.json is None or not given.json.exists():
        threads = os.environ.get("OMP_NUM_THREADS")
        prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
        told = f"{prefix}python tests/benchmarks/compare.py --device {given.device} --repeats {given.repeats}"
        return Document(here, told + (f" --layers {given.layers}" if given.layers else ""))
    document = Document.from_json(json.loads(given.json.read_text()))
    if document.environment | {"date": ""} != here | {"date": ""}:
        raise SystemExit(f"{given.json} was measured elsewhere or with other versions; write to another file")
    document.environment = here
    return document


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print and write."""
    given = arguments(words)
    gc.freeze()  # what was imported is no garbage, and there is a lot of it to look through
    warnings.simplefilter("ignore")  # the peers' own, which are not about what is measured
    plan = planned(given.device, rehearse=given.rehearse, layers=given.layers)
    names = plan.names()
    if given.list:
        print("\n".join(names))
        return
    if not any(fnmatch.fnmatchcase(name, glob) for name in names for glob in given.only):
        raise SystemExit(f"--only {' '.join(given.only)} fits none of:\n" + "\n".join(names))
    document = begun(given, plan.machine)
    start = time.monotonic()
    for report in carry_out(
        plan, document, lambda name: any(fnmatch.fnmatchcase(name, g) for g in given.only), given.repeats
    ):
        print(report.text(), f"({time.monotonic() - start:.0f} s so far)\n", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(document.to_json(), indent=1) + "\n")
    found = plan.claims(document)
    print("claims (rehearsed: they say nothing)" if given.rehearse else "claims", *found, sep="\n")
    if given.markdown is not None:
        given.markdown.write_text(page(document, found, given.device))
    troubles = document.troubles()
    print("", *troubles, sep="\n")
    if any(" failed: " in trouble for trouble in troubles):
        sys.exit("some contenders failed")


if __name__ == "__main__":
    main()
