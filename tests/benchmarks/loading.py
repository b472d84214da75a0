"""Loading a base of 1.3 billion parameters in NF4: streamed from shards, by hand, load-then-quantize, and reloaded.

A model of OPT-1.3B's shapes (24 blocks with d = 2048, a tied embedding of 50,272 words) with random weights in bfloat16
is written shard by shard, 2.6 GB. Each contender is measured in a process of its own, after all files have been read
once, so that the page cache is in the same state. Several minutes for each round on one core.

    python tests/benchmarks/loading.py [--rounds 1]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Claim, Report, environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, load_base, load_quantized, parameters_on_meta, quantize, save_quantized
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import QuantizedLinear
from lightning_lora.quantization.config import NF4Config
from lightning_lora.quantization.nf4 import NF4Linear

VOCABULARY, WIDTH, INNER, BLOCKS = 50_272, 2048, 8192, 24
SHARD_BLOCKS = 6
INDEX = "model.safetensors.index.json"
OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
INTRODUCTION = """# Loading a base

Written by `tests/benchmarks/loading.py`."""


def block() -> nn.ModuleDict:
    square = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return nn.ModuleDict(
        {**square, "up_proj": nn.Linear(WIDTH, INNER, bias=False), "down_proj": nn.Linear(INNER, WIDTH, bias=False)}
    )


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight


def hollow(blocks: int) -> Model:
    with parameters_on_meta():
        return Model(blocks)


def write(folder: Path, blocks: int) -> None:
    """Random weights in shards, one in memory at a time."""
    draw, where = torch.Generator().manual_seed(0), {}
    names = [name for name, _ in hollow(blocks).named_parameters()]
    groups = [["embed.weight"]] + [
        [name for name in names if name.startswith("blocks.") and int(name.split(".")[1]) // SHARD_BLOCKS == shard]
        for shard in range(-(-blocks // SHARD_BLOCKS))
    ]
    shapes = {name: tuple(parameter.shape) for name, parameter in hollow(blocks).named_parameters()}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(
            {name: (torch.randn(shapes[name], generator=draw) * 0.02).bfloat16() for name in group}, folder / file
        )
        where |= dict.fromkeys(group, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def reset_peak() -> int:
    """Let the kernel forget the peak so far, and return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers once each, by their names without adapters."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace(".base_layer", ""): tensor for name, tensor in named if ".adapters." not in name}


def digest(model: nn.Module) -> str:
    """SHA-256 of every stored tensor and of every fingerprint."""
    found = hashlib.sha256()
    for name, tensor in sorted(stored(model).items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in sorted((name.replace(".base_layer", ""), layer) for name, layer in layers.items()):
        found.update(f"{name} {layer.origin}".encode())
    return found.hexdigest()


def streamed(folder: Path, blocks: int) -> nn.Module:
    return load_base(hollow(blocks), folder)


def saved_and_reloaded(folder: Path, blocks: int) -> nn.Module:
    return load_quantized(hollow(blocks), folder)


def by_hand(folder: Path, blocks: int) -> nn.Module:
    """What one writes without a loader: each tensor read, and each weight of a linear layer packed."""
    model, config = hollow(blocks), NF4Config()
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safe_open is no mapping)
                tensor = opened.get_tensor(name)
                if name == "embed.weight":
                    model.embed.weight = model.head.weight = nn.Parameter(tensor.clone())
                else:
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    layer.weight = nn.Parameter(tensor, requires_grad=False)
                    model.set_submodule(name.removesuffix(".weight"), NF4Linear.from_linear(layer, config))
    return model


def load_then_quantize(folder: Path, blocks: int) -> nn.Module:
    model, state = hollow(blocks), {}
    for file in sorted(folder.glob("model-*.safetensors")):
        state |= load_file(file)
    model.load_state_dict(state | {"head.weight": state["embed.weight"]}, assign=True)
    model.head.weight = model.embed.weight
    quantize(inject(model, "all-linear", LoRAConfig(r=1)))
    assert len(adapted_layers(model)) == 6 * blocks
    return model


CONTENDERS: dict[str, Callable[[Path, int], nn.Module]] = {
    "load_base": streamed,
    "by hand": by_hand,
    "load, then quantize": load_then_quantize,
    "load_quantized": saved_and_reloaded,
}


def alone(which: str, folder: Path, blocks: int, saved: Path | None) -> dict[str, object]:
    """Measure one contender in this process, which does nothing else."""
    warm = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    NF4Linear.from_linear(warm, NF4Config())  # bitsandbytes is imported here
    before = reset_peak()
    began, began_cpu = time.perf_counter(), time.process_time()
    model = CONTENDERS[which](folder, blocks)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = status("VmHWM")
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored(model).values())
    if saved is not None:
        save_quantized(model, saved)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "extra": peak - before - size,
        "size": size,
        "digest": digest(model),
        "peak": peak,
    }


def child(which: str, folder: Path, blocks: int, saved: Path | None = None) -> dict[str, object]:
    for file in folder.glob("*.safetensors"):  # the page cache, in the same state for each
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass
    given = [sys.executable, __file__, "--alone", which, str(folder), str(blocks), str(saved or "")]
    run = subprocess.run(given, capture_output=True, text=True, check=False, env=os.environ)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure(rounds: int, blocks: int, folder: Path) -> Report:
    """All contenders in turn, for each round."""
    dense, saved = folder / "dense", folder / "saved"
    dense.mkdir()
    write(dense, blocks)
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name, found in runs.items():
            where = saved if name == "load_quantized" else dense
            keep = saved if name == "load_base" and number == 0 else None
            if name != "load, then quantize" or number == 0:
                found.append(child(name, where, blocks, keep))
                print(name, {key: value for key, value in found[-1].items() if key != "digest"}, flush=True)
    largest = VOCABULARY * WIDTH * 2
    ours = runs["load_base"]
    digests = {run["digest"] for name in ("load_base", "load, then quantize", "load_quantized") for run in runs[name]}

    def ratio(one: str, other: str, key: str = "seconds") -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(runs[one], runs[other], strict=True))

    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    rows = [
        (
            name,
            f"{statistics.median(run['seconds'] for run in found):.1f}",
            f"{statistics.median(run['cpu'] for run in found):.1f}",
            f"{max(run['peak'] for run in found) / 1e6:.0f}",
            f"{max(run['extra'] for run in found) / 1e6:.0f}",
        )
        for name, found in runs.items()
    ]
    return Report(
        title=f"A base of {size / 2e9:.2f} billion parameters: {size / 1e9:.2f} GB in bfloat16, "
        f"{ours[0]['size'] / 1e9:.2f} GB in NF4",
        command=f"OMP_NUM_THREADS={torch.get_num_threads()} python tests/benchmarks/loading.py --rounds {rounds}",
        columns=("contender", "s", "CPU s", "peak MB", "extra MB"),
        rows=rows,
        claims=[
            Claim(
                "load_base: peak above the packed model, of the largest tensor + 300 MB",
                max(run["extra"] for run in ours) / (largest + 300e6),
                1,
            ),
            Claim("load_base: time, of by hand", ratio("load_base", "by hand"), 1.3),
            Claim("load_base: CPU time, of by hand", ratio("load_base", "by hand", "cpu"), 1.3),
            Claim("load_quantized: time, of load_base", ratio("load_quantized", "load_base"), 0.2),
            Claim("different models among load_base, load-then-quantize and load_quantized", len(digests), 1),
        ],
        note="*Peak* is the largest resident memory of the process, *extra* that less what was resident before (Python "
        f"and torch) and less the packed model. The largest tensor is the embedding, {largest / 1e6:.0f} MB. *By hand* "
        "reads each tensor with `safe_open` and packs it, without fingerprints, checks or names; files that are mapped "
        "count as resident while they are open. Models are told apart by all tensors and the fingerprints of the dense "
        "weights; `load_quantized` compares SHA-256 of every tensor.",
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="of all contenders in turn (default 1)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"how many (default {BLOCKS}); fewer for a trial")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write the two files")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        which, folder, blocks, saved = options.alone
        print(json.dumps(alone(which, Path(folder), int(blocks), Path(saved) if saved else None)))
        return
    needed = options.blocks * (4 * WIDTH**2 + 2 * WIDTH * INNER) * 4 + 10**9
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.rounds, options.blocks, Path(folder))
    print(report.text())
    where = environment()
    (options.out / "loading.json").write_text(json.dumps({"environment": where, **report.to_json()}, indent=2) + "\n")
    lines = "\n".join(f"- {name}: {value}" for name, value in where.items())
    (options.out / "loading.md").write_text(f"{INTRODUCTION}\n\n{lines}\n\n{report.markdown().rstrip()}\n")


if __name__ == "__main__":
    main()
