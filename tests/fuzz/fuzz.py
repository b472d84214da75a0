"""Thousands of damaged adapter folders and checkpoints, each to end in one of our errors or in the very adapter.

Half of the damage is to bytes, half to the structure: the safetensors header, what we write into it, the settings, the
archive of a checkpoint. A trial fails if the process crashes, takes over 5 s, asks for over 1 GB, raises another error,
starts a process or opens a file for writing, or if what was loaded computes something else without a word.

    python tests/fuzz/fuzz.py [--trials 20000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_lora import (
    DoRAConfig,
    LoRAConfig,
    LoRAError,
    VeRAConfig,
    inject,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.callbacks.checkpoints import reduce_checkpoint
from lightning_lora.callbacks.finetune import FineTune
from lightning_lora.io.inspection import inspect

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, GIGABYTE = 5, 2**30
X = torch.linspace(-1, 1, 48).view(4, 12)

ODD: list[Any] = [None, True, False, 0, -1, 1, 2, 10**7, 2**63, 1e30, -0.5, float("nan"), float("inf"), "", "x", "2"]
ODD += ["../../etc/passwd", "(a|a)*" * 20 + "b", "\0", "\ud800", [], [[]], [2], {}, {"a": 1}, {"x": {"y": []}}, "LORA"]
ODD += [["body.0"] * 1000, {"(a+)+$": 2}, "torch.os.system", [None], "F64", "F8_E4M3", "nf4/64 double-quantized"]


class Net(LightningModule):
    """A module to adapt, the same each time it is built."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Embedding(4, 8))
            self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[2](self.body[1](self.body[0](x)))) + self.body[3](torch.arange(4))[:, :3]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "body.*", "config": LoRAConfig(r=2, alpha=3), "train": "head"},
    "dora": {"targets": "body.*", "config": DoRAConfig(r=2, alpha=3), "train": "head", "train_bias": "adapted"},
    "vera": {"targets": ["body.0", "body.2"], "config": VeRAConfig(r=4), "train_bias": "all"},
}
ODDS = (3, 1, 1)


def trained(kind: str) -> Net:
    net = Net().eval()
    inject(net, **KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in net.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return net


def write_originals(folder: Path) -> None:
    for kind in KINDS:
        net = trained(kind)
        save_adapter(net, folder / kind)
        state = net.state_dict()
        checkpoint = {"epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.6", "state_dict": state}
        reduce_checkpoint(checkpoint, FineTune.of_adapters(net))
        torch.save(checkpoint, folder / f"{kind}.ckpt")


# ---- damage to bytes


def damage_bytes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        at, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 64))
        kind = draw.randrange(6)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = bytes(draw.randrange(256) for _ in range(length))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(min(length, len(data) - at))
    path.write_bytes(data)


# ---- damage to structure


def damage_json(value: Any, draw: random.Random) -> Any:
    """Change something somewhere in nested data."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        kind = draw.randrange(5)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[draw.choice((*map(str, value), "x", "../y", "a.b"))] = value[key]
        elif kind == 2:
            value[key] = draw.choice(ODD)
        else:
            value[key] = damage_json(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.7:
        index = draw.randrange(len(value))
        value[index] = damage_json(value[index], draw)
        return value
    if isinstance(value, str) and value and draw.random() < 0.5:
        index = draw.randrange(len(value))
        return value[:index] + draw.choice(".*x0/") + value[index + 1 :]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-8, -1, 1, 8, 2**40))
    return draw.choice(ODD)


def damage_config(folder: Path, draw: random.Random) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(damage_json(json.loads(path.read_text()), draw)), encoding="utf-8", errors="replace")


def damage_header(folder: Path, draw: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if draw.random() < 0.5:
        ours = json.loads(header["__metadata__"]["lightning_lora"])
        text = json.dumps(damage_json(ours, draw))
        header["__metadata__"]["lightning_lora"] = text
    else:
        header = damage_json(header, draw)
    text = json.dumps(header).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    size = len(text) if draw.random() < 0.95 else draw.choice((0, 2**20, 2**62, 2**63, 2**64 - 1))
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])


def damage_files(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample((CONFIG, WEIGHTS), 2)
    kind = draw.randrange(5)
    if kind == 0:
        (folder / one).unlink()
    elif kind == 1:
        shutil.copy(folder / one, folder / other)
    elif kind == 2:
        (folder / one).unlink()
        (folder / one).mkdir()
    elif kind == 3:
        (folder / one).unlink()
        (folder / one).symlink_to(draw.choice((folder / one, "/dev/zero", "/nowhere", folder)))
    else:
        (folder / one).rename(folder / "adapter_model.bin")


def damage_entry(path: Path, draw: random.Random) -> None:
    """Change the plain data of a checkpoint and save it again, as it should be saved."""
    found = torch.load(path, weights_only=True)
    place = draw.random()
    if place < 0.6:
        found["lightning_lora"] = damage_json(found["lightning_lora"], draw)
    elif place < 0.8:
        key = draw.choice(sorted(found["state_dict"]))
        tensor = found["state_dict"][key]
        changed = (tensor[:1], tensor.t(), tensor.half(), tensor + 1, tensor * float("nan"), "x", None, tensor.long())
        found["state_dict"][key] = draw.choice(changed)
    else:
        found.pop(draw.choice(sorted(found)))
    torch.save(found, path)


def damage_archive(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    name = draw.choice(sorted(records))
    kind = draw.randrange(3)
    if kind == 0:
        del records[name]
    elif kind == 1:
        data = bytearray(records[name] or b"x")
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        records[name] = bytes(data)
    else:
        records[draw.choice(sorted(records))] = records[name]
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in records.items():
            archive.writestr(each, data)


FOLDER: list[Callable[[Path, random.Random], None]] = [
    lambda folder, draw: damage_bytes(folder / WEIGHTS, draw),
    lambda folder, draw: damage_bytes(folder / CONFIG, draw),
    damage_config,
    damage_header,
    damage_files,
]
FOLDER_WEIGHTS = (30, 15, 25, 25, 5)
CHECKPOINT = [damage_bytes, damage_entry, damage_archive]
CHECKPOINT_WEIGHTS = (50, 35, 15)


# ---- trials


class Watch(logging.Handler):
    """What a trial does beside loading."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False
        self.armed = False
        self.caught: list[str] = []
        logging.getLogger("lightning_lora").addHandler(self)
        logging.getLogger("lightning_lora").propagate = False
        sys.addaudithook(self.audit)

    def emit(self, record: logging.LogRecord) -> None:
        self.told = True

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
        if writes or event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.mkdir", "os.remove"):
            self.caught.append(f"{event} {arguments[:1]}")


def timed_out(*_: Any) -> None:
    raise TimeoutError


def trial(work: Path, originals: Path, draw: random.Random, watch: Watch, expected: dict[str, torch.Tensor]) -> str:
    """Run one trial and say how it ended; anything with a capital letter is a failure."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    kind, folder = draw.choices(list(KINDS), ODDS)[0], draw.random() < 0.6
    looked = draw.random() < 0.2
    if folder:
        shutil.copytree(originals / kind, work / "adapter")
        draw.choices(FOLDER, FOLDER_WEIGHTS)[0](work / "adapter", draw)
    else:
        shutil.copy(originals / f"{kind}.ckpt", work / "x.ckpt")
        draw.choices(CHECKPOINT, CHECKPOINT_WEIGHTS)[0](work / "x.ckpt", draw)
    watch.told, watch.caught, watch.armed = False, [], True
    signal.alarm(SECONDS)
    try:
        if looked:
            inspect(work / ("adapter" if folder else "x.ckpt"))
            return "described"
        net = load_adapter(Net().eval(), work / "adapter") if folder else load_from_checkpoint(Net, work / "x.ckpt")
    except LoRAError as error:
        said = str(error)
        return "refused" if str(work) in said and len(said) < 3000 else f"UNCLEAR: {said[:200]}"
    except TimeoutError:
        return "HANG"
    except MemoryError:
        return "MEMORY"
    except Exception as error:
        return f"OTHER ERROR: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        watch.armed = False
        if watch.caught:
            return f"CODE: {watch.caught}"  # noqa: B012 (it overrules whatever else happened)
    if torch.equal(net(X), expected[kind]):
        return "the very adapter"
    return "another adapter, and said so" if watch.told else "SILENT CHANGE"


def run(trials: int, seed: int) -> Counter[str]:
    """Run the trials and count how they ended."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch = Watch()
    signal.signal(signal.SIGALRM, timed_out)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        originals, work = Path(place) / "originals", Path(place) / "work"
        originals.mkdir()
        write_originals(originals)
        expected = {kind: trained(kind)(X).detach() for kind in KINDS}
        for kind in KINDS:
            assert torch.equal(load_adapter(Net().eval(), originals / kind)(X), expected[kind])
            assert torch.equal(load_from_checkpoint(Net, originals / f"{kind}.ckpt")(X), expected[kind])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, resource.RLIM_INFINITY))
        for number in range(trials):
            outcome = trial(work, originals, random.Random(f"{seed} {number}"), watch, expected)
            outcomes[outcome if outcome.islower() else outcome.split(":")[0]] += 1
            if outcome[0].isupper():
                print(f"trial {number}: {outcome}", flush=True)
                kept = Path(tempfile.gettempdir()) / f"lightning_lora_fuzz_{seed}_{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(work, kept, symlinks=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    began = time.perf_counter()
    outcomes = run(options.trials, options.seed)
    for outcome, count in outcomes.most_common():
        print(f"{count:7,}  {outcome}")
    seconds = time.perf_counter() - began
    print(
        f"{options.trials:,} trials, seed {options.seed}, {seconds:.0f} s ({options.trials / seconds:.0f} per second)"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(outcomes))
    return 1 if any(outcome[0].isupper() for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
