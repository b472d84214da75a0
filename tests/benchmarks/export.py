"""The merged export over NF4: extra memory at its peak, and time against ``safetensors.save_file`` of the same bytes.

Eight blocks of Llama's shape with d = 2048 (four layers of 2048 x 2048, three of 2048 x 5632), 1.6 GB in float32. Each
figure is taken in a process of its own, and both ways of writing end with the bytes on disk.

    python tests/benchmarks/export.py [--dtype float32|bfloat16]
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
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, export_merged, inject, merge, quantize

WIDTH, INNER, BLOCKS = 2048, 5632, 8


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
        command = [sys.executable, __file__, "--which", which, "--dtype", dtype, "--out", folder]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="alternating; the best time and the worst memory count")
    parser.add_argument("--which", choices=["streamed", "at_once"])
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.which:
        run = {"streamed": streamed, "at_once": at_once}[options.which]
        print(json.dumps(run(getattr(torch, options.dtype), options.out)))
        return
    runs = [(alone("streamed", options.dtype), alone("at_once", options.dtype)) for _ in range(options.repeats)]
    ours, theirs = ({key: min(run[side][key] for run in runs) for key in runs[0][side]} for side in (0, 1))
    ours["extra"] = max(run[0]["extra"] for run in runs)
    bound = 2 * ours["largest_layer"] + 100e6
    print(f"{options.dtype}: {ours['bytes'] / 1e9:.2f} GB")
    print(f"extra memory {ours['extra'] / 1e6:.0f} MB, bound 2 x largest layer + 100 MB = {bound / 1e6:.0f} MB")
    print(
        f"streamed, verified and synced {ours['seconds']:.1f} s; save_file {theirs['seconds']:.1f} s, "
        f"{theirs['seconds_with_fsync']:.1f} s with fsync: ratio {ours['seconds'] / theirs['seconds']:.2f}, "
        f"{ours['seconds'] / theirs['seconds_with_fsync']:.2f} with fsync"
    )


if __name__ == "__main__":
    main()
