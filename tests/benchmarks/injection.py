"""Time to put adapters into a model of the shape of Llama-2-7B, beside PEFT's, on the meta device.

All 224 linear layers of the 32 blocks get an adapter of rank 16; embedding and output head stay. On the meta device no
weight is allocated, so what is timed is the search, the checks and the making of modules. Every measurement takes a
fresh model, contenders take turns, and the table has the medians.

  ours          inject(model)
  PEFT          get_peft_model(model, LoraConfig naming the seven projections): its default, which draws the
                adapters' starting values on the CPU before it moves them
  PEFT low mem  the same with low_cpu_mem_usage=True: adapters are made on the meta device too
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import peft
import torch
from report import Claim, Report, command, run
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.model.layers import adapted_layers

BLOCKS, WIDTH, HIDDEN, VOCABULARY, R = 32, 4096, 11008, 32000, 16
SHAPES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)) | {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}
ADAPTED = BLOCKS * len(SHAPES)


class Llama(nn.Module):
    """The modules of Llama-2-7B that have matrices, on the meta device; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, device="meta")
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False, device="meta") for name, shape in SHAPES.items()})
            for _ in range(BLOCKS)
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False, device="meta")


def ours(model: Llama) -> None:
    """Inject with this library; "all-linear" leaves the head by itself."""
    inject(model, config=LoRAConfig(r=R))


def theirs(model: Llama, *, low_cpu_mem_usage: bool = False) -> None:
    """Inject with PEFT."""
    config = peft.LoraConfig(r=R, target_modules=list(SHAPES))
    peft.get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)


CONTENDERS: dict[str, Callable[[Llama], None]] = {
    "ours": ours,
    "PEFT": theirs,
    "PEFT low mem": lambda model: theirs(model, low_cpu_mem_usage=True),
}


def measure(repeats: int) -> Report:
    """Time each contender on fresh models, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for index in range(-1, repeats):  # the first round is not counted: imports finish and caches fill in it
        for name, contender in CONTENDERS.items():
            elapsed = once(contender)
            if index >= 0:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    claim = Claim(f"inject takes at most 0.3 s for {ADAPTED} layers, in seconds", medians["ours"], 0.3)
    return Report(
        title=f"Injecting adapters (r={R}) into the {ADAPTED} linear layers of a 7B model on the meta device",
        command=command(__file__, repeats),
        columns=["contender", "median, s", "fastest, s", "slowest, s", "ours / this"],
        rows=[[name, medians[name], min(s), max(s), medians["ours"] / medians[name]] for name, s in seconds.items()],
        claims=[claim],
        note="*PEFT* is `get_peft_model` as it comes; *PEFT low mem* passes `low_cpu_mem_usage=True`.",
    )


def once(contender: Callable[[Llama], None]) -> float:
    """Time one contender on a model of its own, and check that it adapted what it should."""
    model = Llama()
    gc.collect()
    start = time.perf_counter()
    contender(model)
    elapsed = time.perf_counter() - start
    check(model)
    return elapsed


def check(model: Llama) -> None:
    """Assert that every layer of every block was adapted, and nothing else, and that only adapters are trained."""
    found = len(adapted_layers(model)) or sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    assert found == ADAPTED
    assert type(model.lm_head) is nn.Linear
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == BLOCKS * sum(R * (i + o) for i, o in SHAPES.values())
    assert all(p.device == torch.device("meta") for p in model.parameters())


if __name__ == "__main__":
    run(__doc__, measure, repeats=7)
