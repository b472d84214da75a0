"""What becomes of files that are damaged, and of saves that are killed: thousands of each, counted.

Three parts, each of which can be run alone; the others keep the figures of their last run. ``damaged`` is
``tests/fuzz/fuzz.py`` in a process of its own, under a limit of memory. ``system_calls`` kills a save at each of its
system calls and lets each of them fail, with strace. ``kills`` sends SIGKILL at random moments of periodic saves.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from report import Claim, Report, environment

from tests.crash import kills, syscalls
from tests.crash.layouts import AdapterFolder, Checkpoint, Export, layouts

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
FUZZER = Path(__file__).resolve().parents[1] / "fuzz" / "fuzz.py"
INTRODUCTION = """# Damaged files and killed saves

Written by `tests/benchmarks/integrity.py`. What is checked when a file is read is told in
[Files on disk](../disk.md)."""


def main() -> None:
    """Run the parts that are asked for, and write all figures."""
    arguments = parse()
    stored = arguments.out / "integrity.json"
    reports: dict[str, dict] = json.loads(stored.read_text()) if stored.is_file() else {}
    for part in arguments.parts or PARTS:
        report = PARTS[part](arguments)
        print(f"{report.text()}\n", flush=True)
        reports[part] = {"environment": environment(), **report.to_json()}
        stored.write_text(json.dumps(reports, indent=2) + "\n")
    sections = [markdown(reports[part]) for part in PARTS if part in reports]
    (arguments.out / "integrity.md").write_text("\n\n".join([INTRODUCTION, *sections]) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="default: all")
    parser.add_argument("--trials", type=int, default=20_000, help="damaged files (default 20000)")
    parser.add_argument("--kills", type=int, default=300, help="kills at random moments (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (default 0)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write the two files")
    return parser.parse_args()


def damaged(arguments: argparse.Namespace) -> Report:
    """Damage adapter folders and checkpoints, and load them."""
    with tempfile.TemporaryDirectory() as place:
        counts = Path(place) / "counts.json"
        given = ["--trials", str(arguments.trials), "--seed", str(arguments.seed), "--json", str(counts)]
        subprocess.run([sys.executable, str(FUZZER), *given], check=False, stdout=subprocess.DEVNULL)
        outcomes = Counter(json.loads(counts.read_text()))
    bad = sum(count for outcome, count in outcomes.items() if outcome[0].isupper())
    return Report(
        title=f"{arguments.trials:,} damaged adapter folders and checkpoints",
        command=_command("damaged", trials=arguments.trials, seed=arguments.seed),
        columns=("what came of it", "files"),
        rows=[(outcome, f"{count:,}") for outcome, count in outcomes.most_common()],
        claims=(Claim("crashes, hangs over 5 s, over 1 GB, code run, unclear errors or silent changes", bad, 0),),
        note="Six in ten are folders, four in ten checkpoints; half of the damage is to bytes, half to structure "
        "(headers, settings, archives). *Refused* means one of our errors that names the file.",
    )


def system_calls(_: argparse.Namespace) -> Report:
    """Kill each save at each system call, and let each call fail with a full disk."""
    rows, bad = [], 0
    for layout in layouts():
        faults = list(syscalls.faults(syscalls.calls_of(layout)))
        outcomes = {fault: syscalls.trial(layout, fault) for fault in faults}
        wrong = {fault: outcome for fault, outcome in outcomes.items() if outcome not in ("old", "new")}
        for fault, outcome in wrong.items():
            print(f"{layout.name}: {fault}: {outcome}", flush=True)
        killed = sum(fault.what == "SIGKILL" for fault in faults)
        found = Counter(outcomes.values())
        rows.append((layout.name, str(killed), str(len(faults) - killed), str(found["old"]), str(found["new"])))
        bad += len(wrong)
    strace = subprocess.run(["strace", "-V"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return Report(
        title="A crash at every system call of a save",
        command=_command("system_calls"),
        columns=("what is saved", "SIGKILL at a call", "ENOSPC from a call", "old version loads", "new version loads"),
        rows=rows,
        claims=(Claim("faults after which neither loads, or litter stays, or the next save fails", bad, 0),),
        note=f"SIGKILL at every {', '.join(syscalls.KILLED_AT)}; ENOSPC from every {', '.join(syscalls.WRITING)}. "
        f"Injected with {strace}.",
    )


def random_kills(arguments: argparse.Namespace) -> Report:
    """Kill processes that save all the time."""
    layouts()  # sets this process up
    several = [AdapterFolder(changing=True), Checkpoint(), Export("merged export, shards", "300KB")]
    draw, rows, bad = random.Random(arguments.seed), [], 0
    for layout in several:
        count, longest = arguments.kills // len(several), kills.longest_of(layout)
        outcomes = Counter(kills.trial(layout, draw, longest) for _ in range(count))
        rows.append((layout.name, str(count), str(outcomes["finished"]), str(outcomes["next"])))
        bad += count - outcomes["finished"] - outcomes["next"]
        print(layout.name, dict(outcomes), flush=True)
    return Report(
        title=f"{arguments.kills} kills at random moments of periodic saves",
        command=_command("kills", kills=arguments.kills, seed=arguments.seed),
        columns=("what is saved", "kills", "the last finished version loads", "the one being written loads"),
        rows=rows,
        claims=(Claim("kills after which neither loads", bad, 0),),
        note="Each process saves one version after another in the same place, and dies within its first few saves.",
    )


PARTS = {"damaged": damaged, "system_calls": system_calls, "kills": random_kills}


def markdown(report: dict) -> str:
    """A part of the page, with where and when it ran."""
    where = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    table = Report.from_json({key: value for key, value in report.items() if key != "environment"}).markdown()
    return f"{table.rstrip()}\n\nRan with: {where}."


def _command(part: str, **options: int) -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    given = "".join(f" --{name} {value}" for name, value in options.items())
    return f"PYTHONPATH=. {prefix}python tests/benchmarks/integrity.py {part}{given}"


if __name__ == "__main__":
    faulthandler.enable()
    main()
