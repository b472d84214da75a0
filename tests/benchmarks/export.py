"""The merged export over NF4: extra memory at its peak, and time against ``safetensors.save_file`` of the same bytes.

Eight blocks of Llama's shape with d = 2048 (four layers of 2048 x 2048, three of 2048 x 5632), 1.6 GB in float32. Each
figure is taken in a process of its own, and both ways of writing end with the bytes on disk.

    python tests/benchmarks/export.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import Claim, Report, command, environment
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, export_merged, inject, merge, quantize

WIDTH, INNER, BLOCKS = 2048, 5632, 8
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed memory goes back at once, and what is resident is in use
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


def synced(folder: str) -> None:
    for path in Path(folder).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def streamed(dtype: torch.dtype, folder: str) -> dict[str, float]:
    made = model(dtype)
    largest = WIDTH * INNER * torch.empty(0, dtype=dtype).element_size()
    before = reset_peak()
    began = time.perf_counter()
    export_merged(made, folder)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"seconds": seconds, "bytes": size, "extra": high_water() - before, "largest_layer": largest}


def at_once(dtype: torch.dtype, folder: str) -> dict[str, float]:
    state = merge(model(dtype)).state_dict()
    began = time.perf_counter()
    save_file(state, f"{folder}/model.safetensors")
    plain = time.perf_counter() - began
    synced(folder)
    return {"seconds": plain, "seconds_with_fsync": time.perf_counter() - began}


def alone(which: str, dtype: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        given = [sys.executable, __file__, "--alone", which, dtype, folder]
        run = subprocess.run(given, capture_output=True, text=True, check=True, env=os.environ | _MALLOC)
        return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="per case, alternating (default 5)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write the two files")
    parser.add_argument("--alone", nargs=3, metavar=("WHICH", "DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        which, dtype, folder = options.alone
        print(json.dumps({"streamed": streamed, "at_once": at_once}[which](getattr(torch, dtype), folder)))
        return
    report = measure(options.repeats)
    print(report.text())
    where = environment()
    (options.out / "export.json").write_text(json.dumps({"environment": where, **report.to_json()}, indent=2) + "\n")
    lines = "\n".join(f"- {name}: {value}" for name, value in where.items())
    (options.out / "export.md").write_text(f"{INTRODUCTION}\n\n{lines}\n\n{report.markdown().rstrip()}\n")


def measure(repeats: int) -> Report:
    """Both ways of writing in turn, for both dtypes."""
    rows, claims = [], []
    for dtype in ("float32", "bfloat16"):
        runs = [(alone("streamed", dtype), alone("at_once", dtype)) for _ in range(repeats)]
        ours, theirs = ({key: min(run[side][key] for run in runs) for key in runs[0][side]} for side in (0, 1))
        extra = max(run[0]["extra"] for run in runs)
        bound = 2 * ours["largest_layer"] + 100e6
        ratio, unsynced = (ours["seconds"] / theirs[key] for key in ("seconds_with_fsync", "seconds"))
        rows.append(
            (
                dtype,
                f"{ours['bytes'] / 1e9:.2f}",
                f"{extra / 1e6:.0f}",
                f"{bound / 1e6:.0f}",
                f"{ours['seconds']:.1f}",
                f"{theirs['seconds']:.1f}",
                f"{theirs['seconds_with_fsync']:.1f}",
                f"{unsynced:.2f}",
                f"{ratio:.2f}",
            )
        )
        claims += [
            Claim(f"{dtype}: extra memory, of 2 x the largest layer + 100 MB", extra / bound, 1),
            Claim(f"{dtype}: time, of save_file and fsync", ratio, 2),
        ]
    columns = (
        "stored in",
        "GB",
        "extra MB",
        "bound MB",
        "export s",
        "save_file s",
        "and fsync s",
        "ratio",
        "with fsync",
    )
    return Report(
        title="The merged export of eight blocks with d = 2048 over NF4",
        command=command(__file__, repeats),
        columns=columns,
        rows=rows,
        claims=claims,
        note="*Extra* is the peak of the resident memory during the export less what was resident before it, in the "
        "worst run; freed memory is given back at once (`MALLOC_MMAP_THRESHOLD_`), else what glibc keeps would count. "
        "Times are the best of runs that alternate, each in a process of its own: what else ran on the machine only "
        "adds. `save_file` is given tensors that are merged already and leaves them in the page cache; the export "
        "dequantizes, merges, writes, reads headers and a sample again, and ends with the bytes on disk: *with fsync* "
        "compares like with like.",
    )


if __name__ == "__main__":
    main()
