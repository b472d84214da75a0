"""Kill runs at random points, resume them from their last checkpoint, and compare them with the run left alone.

Each run trains LoRA or QLoRA, with torch's AdamW or the paged 8-bit one, with or without accumulation: eight
combinations, taken in turn. Who writes checkpoints, where the run dies (some die twice) and the rest is drawn; see
``tests/integration/kill_points.py``. Losses, learning rates, trained and merged weights, optimizer and scheduler states
have to be equal bit for bit. The first few die by SIGKILL, each attempt in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import random
import tempfile
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path

from report import Claim, Report, environment

from tests.integration.kill_points import (
    Scenario,
    differences,
    draw,
    run_killed,
    run_killed_in_processes,
    run_straight,
)

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
BASES, OPTIMIZERS, ACCUMULATIONS = (None, "nf4"), (None, "paged_adamw_8bit"), (1, 4)
COMBINATIONS = list(itertools.product(BASES, OPTIMIZERS, ACCUMULATIONS))
INTRODUCTION = """# Killed and resumed

Written by `tests/benchmarks/kill_points.py`: runs of 25 to 30 batches in epochs of 10, with shuffling
(`torchdata.stateful_dataloader.StatefulDataLoader`), dropout and a schedule, are killed at random points and resumed
with `ckpt_path=`."""


def main() -> None:
    """Run, print and write."""
    arguments = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    outcomes = []
    for number, scenario in enumerate(scenarios(arguments.count, arguments.seed, arguments.processes)):
        found = compare(scenario, in_processes=number < arguments.processes)
        outcomes.append((scenario, found))
        print(f"{number + 1}/{arguments.count} {'; '.join(found) or 'equal'}", flush=True)
        if found:
            print(f"    {scenario}")
    report = tabulate(outcomes, arguments)
    print(f"\n{report.text()}")
    write(report, outcomes, arguments.out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="runs to kill (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (default 0)")
    parser.add_argument("--processes", type=int, default=4, help="how many of them die by SIGKILL (default 4)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write the two files")
    return parser.parse_args()


def scenarios(count: int, seed: int, processes: int) -> list[Scenario]:
    """Draw the scenarios; those for SIGKILL have no SIGTERM in them."""
    dice = random.Random(seed)
    drawn: list[Scenario] = []
    while len(drawn) < count:
        scenario = draw(dice, *COMBINATIONS[len(drawn) % len(COMBINATIONS)])
        if len(drawn) >= processes or all(death.moment != "sigterm" for death in scenario.deaths):
            drawn.append(scenario)
    return drawn


def compare(scenario: Scenario, *, in_processes: bool) -> list[str]:
    """Run a scenario both ways and say what differs; a resume that fails differs too."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        straight = run_straight(scenario, Path(one))
        killed = run_killed_in_processes if in_processes else run_killed
        try:
            return differences(straight, killed(scenario, Path(other)))
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]


def tabulate(outcomes: list[tuple[Scenario, list[str]]], arguments: argparse.Namespace) -> Report:
    """Count what was equal, by combination."""
    runs: Counter[tuple[str | None, str | None, int]] = Counter()
    equal = runs.copy()
    for scenario, found in outcomes:
        combination = (scenario.quantization, scenario.optimizer, scenario.accumulation)
        runs[combination] += 1
        equal[combination] += not found
    rows = [
        (base or "dense", optimizer or "torch AdamW", str(batches), str(runs[key]), str(equal[key]))
        for key in COMBINATIONS
        for base, optimizer, batches in [key]
    ]
    died = Counter(death.moment for scenario, _ in outcomes for death in scenario.deaths)
    wrote = Counter(scenario.writer for scenario, _ in outcomes)
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return Report(
        title=f"{len(outcomes)} random kill points",
        command=f"PYTHONPATH=. {prefix}python tests/benchmarks/kill_points.py "
        f"--count {arguments.count} --seed {arguments.seed} --processes {arguments.processes}",
        columns=("base", "optimizer", "batches per step", "runs", "equal bit for bit"),
        rows=rows,
        claims=(Claim("runs that do not end as the uninterrupted one", sum(runs.values()) - sum(equal.values()), 0),),
        note=f"Written by: {_listed(wrote)}. Died at: {_listed(died)}. {arguments.processes} of them were processes "
        "killed by SIGKILL.",
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def write(report: Report, outcomes: list[tuple[Scenario, list[str]]], folder: Path) -> None:
    """Write ``resume.md`` and ``resume.json``."""
    where = environment() | {"torchdata": metadata.version("torchdata")}
    document = {
        "environment": where,
        **report.to_json(),
        "failures": [dataclasses.asdict(scenario) | {"differences": found} for scenario, found in outcomes if found],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resume.json").write_text(json.dumps(document, indent=2) + "\n")
    lines = "\n".join(f"- {name}: {value}" for name, value in where.items())
    (folder / "resume.md").write_text(f"{INTRODUCTION}\n\n{lines}\n\n{report.markdown().rstrip()}\n")


if __name__ == "__main__":
    main()
