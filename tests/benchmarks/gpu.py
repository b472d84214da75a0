"""Everything that needs a GPU, in one call: the tests marked ``gpu`` and each benchmark that has a figure for CUDA.

Parts run one after the other, each in a process of its own and for as long as it is given, 25 minutes in all. Whatever
a part prints is in a file of its own, figures are written as soon as they are there, and a part that fails or runs out
of time leaves the others to run. Start with --only and some parts where one call may not take that long; figures of
compare.py are added to those of parts before.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Part:
    """One command and the seconds it is given; ``{out}`` in it is the folder."""

    seconds: int
    command: tuple[str, ...]


def script(name: str, *arguments: str) -> tuple[str, ...]:
    """A benchmark on CUDA."""
    return (str(HERE / name), "--device", "cuda", *arguments)


def compared(*scenarios: str) -> tuple[str, ...]:
    """Some scenarios of compare.py, whose figures add up in one file."""
    files = ("--json", "{out}/compare-cuda.json", "--markdown", "{out}/compare-cuda.md")
    return script("compare.py", "--repeats", "6", *files, "--only", *scenarios)


PARTS = {
    "tests": Part(180, ("-m", "pytest", "-m", "gpu", "-q", "tests")),
    "kernels": Part(80, script("nf4_kernels.py", "--json", "{out}/kernels.md")),
    "optimizer": Part(
        80, script("optimizer_step.py", "--json", "{out}/optimizer.json", "--markdown", "{out}/optimizer.md")
    ),
    "lora": Part(240, compared("decoder*x1024 tokens, bf16*")),
    "qlora": Part(270, compared("decoder*x1024 tokens, nf4*")),
    "few-tokens": Part(260, compared("decoder*x512 tokens*")),
    "once": Part(300, compared("in place*", "from the host*")),
    "vision": Part(90, compared("ViT*")),
}


def main() -> None:
    """Run what was asked for, and say how each part ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where all files are written")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="name the parts with their commands, and do nothing")
    given = parser.parse_args()
    chosen = {name: part for name, part in PARTS.items() if name in (given.only or PARTS)}
    if given.list:
        for name, part in chosen.items():
            print(f"{name}, at most {part.seconds} s: {' '.join(written(part, given.out))}")
        return
    given.out.mkdir(parents=True, exist_ok=True)
    ends = {name: run(name, part, given.out) for name, part in chosen.items()}
    failed = [name for name, end in ends.items() if end != "done"]
    sys.exit(f"not done: {', '.join(failed)}" if failed else 0)


def written(part: Part, out: Path) -> list[str]:
    """The command line of a part."""
    return [sys.executable, *(word.format(out=out) for word in part.command)]


def run(name: str, part: Part, out: Path) -> str:
    """Run a part, with its output in a file, and return and print how it ended."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            written(part, out.resolve()),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.seconds)
            end = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what compiles for it
            process.wait()
            end = f"stopped after {part.seconds} s"
    print(f"{name}: {end} ({time.monotonic() - start:.0f} s), {out / f'{name}.log'}", flush=True)
    return end


if __name__ == "__main__":
    main()
