"""The merged export over NF4: extra memory at its peak, and time against ``safetensors.save_file`` of the same bytes.

Eight blocks of Llama's shape with d = 2048 (four layers of 2048 x 2048, three of 2048 x 5632), 1.6 GB in float32. The
memory is that of a process of its own. For the time, both ways of writing take turns in one process, each right after
a file of the same bytes was written and deleted, and both end with ``fsync``: the page cache is in the same state.

    python tests/benchmarks/export.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Claim, Report, command, environment
from safetensors.torch import save_file
from timing import median_ratio
from torch import nn

from lightning_lora import LoRAConfig, export_merged, inject, merge, quantize
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import weight_dtype

WIDTH, INNER, BLOCKS = 2048, 5632, 8
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed memory goes back at once, and what is resident is in use
WARM_UP = 1
"""Rounds not counted."""
NOTE = """*Extra* is the peak of the resident memory during an export less what was resident before it; freed memory is
given back at once (`MALLOC_MMAP_THRESHOLD_`), else what glibc keeps would count. Times are medians of rounds in which
all take turns, and *ratio* is the median of the ratios within a round. Each writes to an empty folder right after a
file of the same bytes was written there, synced and deleted: the page cache has memory for all of them alike (where
a virtual machine has to get it from its host first, both take longer by as much, and the ratio falls). The export
ends with `fsync`, as it always does, and so does what it is compared with. `save_file` is given tensors that are
merged already. *Merging alone* is what dequantizing, merging and rounding take where nothing is written; beside
that the export writes, checks what it computed for NaN and infinity, and reads headers and a sample again, which it
merges a second time to compare. It does so in two threads, each with half of torch's: all that is done is done beside
something else, where the disk allows it. Where the page cache is warm, merging alone takes longer than `save_file`."""
OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
INTRODUCTION = """# The merged export

Written by `tests/benchmarks/export.py`."""


def block() -> nn.Module:
    square = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {name: nn.Linear(WIDTH, INNER, bias=False) for name in ("gate_proj", "up_proj")}
    return nn.ModuleDict({**square, **mlp, "down_proj": nn.Linear(INNER, WIDTH, bias=False)})


def model(dtype: torch.dtype) -> nn.Module:
    """Built block by block, so that its dense weights never set the peak."""
    made = nn.ModuleList()
    for _ in range(BLOCKS):
        made.append(quantize(inject(block().to(dtype), "*_proj", LoRAConfig(r=16))))
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return made


def reset_peak() -> int:
    """Let the kernel forget the peak so far, and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) * 1024


def high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(dtype: torch.dtype, folder: str) -> dict[str, float]:
    made = model(dtype)
    before = reset_peak()
    export_merged(made, folder)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"bytes": size, "extra": high_water() - before}


def times(dtype: torch.dtype, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    made = model(dtype)
    state = merge(copy.deepcopy(made)).state_dict()
    steps: dict[str, Callable[[str], object]] = {
        "merge": lambda _: merged_only(made),
        "export": lambda folder: export_merged(made, folder),
    }
    steps["save_file"] = lambda folder: save_file(state, f"{folder}/model.safetensors")
    steps["fsync"] = lambda folder: saved(state, folder)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-WARM_UP, repeats):
        for name, step in steps.items():
            found[name] += [timed(step, state)] * (round_ >= 0)
    return found


def timed(step: Callable[[str], object], state: dict[str, torch.Tensor]) -> float:
    """Seconds of a step in an empty folder, right after a file of the same bytes was written, synced and deleted."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saved(state, folder)
        os.sync()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        began = time.perf_counter()
        step(folder)
        return time.perf_counter() - began


def merged_only(made: nn.Module) -> None:
    """Merge all layers as the export does, and drop what comes out."""
    for layer in adapted_layers(made).values():
        for _ in layer.merged_pieces(weight_dtype(layer.base_layer)):
            pass


def saved(state: dict[str, torch.Tensor], folder: str) -> None:
    save_file(state, f"{folder}/model.safetensors")
    with open(f"{folder}/model.safetensors", "rb") as file:
        os.fsync(file.fileno())


def alone(dtype: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        given = [sys.executable, __file__, "--alone", dtype, folder]
        run = subprocess.run(given, capture_output=True, text=True, check=True, env=os.environ | _MALLOC)
        return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, in which all take turns (default 7)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write the two files")
    parser.add_argument("--alone", nargs=2, metavar=("DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        dtype, folder = options.alone
        print(json.dumps(memory(getattr(torch, dtype), folder)))
        return
    report = measure(options.repeats)
    print(report.text())
    where = environment()
    (options.out / "export.json").write_text(json.dumps({"environment": where, **report.to_json()}, indent=2) + "\n")
    lines = "\n".join(f"- {name}: {value}" for name, value in where.items())
    (options.out / "export.md").write_text(f"{INTRODUCTION}\n\n{lines}\n\n{report.markdown().rstrip()}\n")


def measure(repeats: int) -> Report:
    """Memory and time, for both dtypes."""
    rows, claims = [], []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found, seconds = alone(name), times(dtype, repeats)
        bound = 2 * WIDTH * INNER * dtype.itemsize + 100e6
        middle = {step: statistics.median(each) for step, each in seconds.items()}
        ratio = median_ratio(seconds["export"], seconds["fsync"])
        rows.append(
            (
                name,
                f"{found['bytes'] / 1e9:.2f}",
                f"{found['extra'] / 1e6:.0f}",
                f"{bound / 1e6:.0f}",
                *(f"{middle[step]:.2f}" for step in ("export", "merge", "save_file", "fsync")),
                f"{ratio:.2f}",
                f"{min(seconds['export']):.2f} / {min(seconds['fsync']):.2f}",
            )
        )
        claims += [
            Claim(f"{name}: extra memory, of 2 x the largest layer + 100 MB", found["extra"] / bound, 1),
            Claim(f"{name}: time, of save_file and fsync", ratio, 2),
        ]
    columns = (
        "stored in",
        "GB",
        "extra MB",
        "bound MB",
        "export s",
        "merging alone s",
        "save_file s",
        "save_file and fsync s",
        "ratio",
        "fastest s",
    )
    return Report(
        title="The merged export of eight blocks with d = 2048 over NF4",
        command=command(__file__, repeats),
        columns=columns,
        rows=rows,
        claims=claims,
        note=NOTE.replace("\n", " "),
    )


if __name__ == "__main__":
    main()
