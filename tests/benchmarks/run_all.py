"""Run the benchmarks of parts and write what they found to docs/benchmarks/cpu.md and docs/benchmarks/cpu.json.

Whole training steps beside the peers' are in compare.py, which writes a page of its own.

Each script runs in a process of its own, with the threads asked for; its table appears as soon as it is done. Takes
about ten minutes on two cores. The written tables name the command that makes each of them again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import Report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = (
    "linear_step.py",
    "dequantized_cache.py",
    "dora_step.py",
    "saved_activations.py",
    "recomputation.py",
    "injection.py",
    "quantization_memory.py",
    "callback_overhead.py",
    "monitor_overhead.py",
    "routing.py",
)
INTRODUCTION = """# Benchmarks on a CPU

Written by `python tests/benchmarks/run_all.py`. Each section names the command that makes its figures again, from the
root of the repository. Figures of time are comparable within a row, not between machines."""


def main() -> None:
    """Run, print and write."""
    arguments = parse()
    chosen = arguments.only or SCRIPTS
    kept = json.loads((arguments.out / "cpu.json").read_text()) if arguments.only else {}
    missing = [script for script in SCRIPTS if script not in chosen and script not in kept]
    if missing:
        raise SystemExit(f"{', '.join(missing)} has no figures yet; run it too")
    documents = {script: run(script, arguments.threads) if script in chosen else kept[script] for script in SCRIPTS}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu.md").write_text(markdown(list(documents.values())))
    (arguments.out / "cpu.json").write_text(json.dumps(documents, indent=2) + "\n")
    unmet = [claim["text"] for document in documents.values() for claim in document["claims"] if not claim["met"]]
    print(f"wrote {arguments.out}/cpu.md and cpu.json; {len(unmet)} claims not met")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="OMP_NUM_THREADS of every benchmark (default 1: with more, whatever else runs on the machine makes "
        "threads wait for each other, and small operations look far dearer than they are)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SCRIPTS,
        metavar="SCRIPT",
        help=f"run these and keep the other figures as they are ({', '.join(SCRIPTS)})",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="FOLDER", help="where to write the two files"
    )
    return parser.parse_args()


def run(script: str, threads: int) -> dict[str, Any]:
    """Run one benchmark, let it print its table, and return what it wrote."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        subprocess.run([sys.executable, str(HERE / script), "--json", str(written)], check=True, env=environment)
        print()
        document: dict[str, Any] = json.loads(written.read_text())
    return document


def markdown(documents: list[dict[str, Any]]) -> str:
    """The page: where it ran, then each table under its command.

    Raises:
        SystemExit: If figures that were kept come from another machine or other versions.
    """
    environments = [document["environment"] for document in documents]
    varying = {"date": "", "threads": 0}  # threads stand in the command of each section
    if any(each | varying != environments[0] | varying for each in environments):
        raise SystemExit("some of the figures were measured elsewhere; run all of them again, without --only")
    environment = max(environments, key=lambda each: str(each["date"]))
    where = "\n".join(f"- {name}: {value}" for name, value in environment.items())
    reports = [Report.from_json({k: v for k, v in document.items() if k != "environment"}) for document in documents]
    sections = [report.markdown().rstrip() for report in reports]
    for index, document in enumerate(documents):
        if document["environment"] != environment:
            sections[index] += "\n\nMeasured on " + ", ".join(
                f"{name} {value}" for name, value in document["environment"].items() if value != environment[name]
            )
    return "\n\n".join([INTRODUCTION, where, *sections]) + "\n"


if __name__ == "__main__":
    main()
