"""What is promised of speed and memory, held against the figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from report import Claim

from peers.contender import Setting
from peers.document import FLOOR, MIB, OURS, PEFT, PEFT_BF16, Document
from peers.handling import FromHost, InPlace
from peers.scenario import Scenario
from peers.workload import Workload

LORA, QLORA = Setting("bf16"), Setting("nf4")
KINDS = {"LoRA": LORA, "QLoRA": QLORA}
ANSWERS = {"compiled": "ours compiled", "CUDA graph": "ours, CUDA graph"}


def of_handling(workload: Workload, setting: Setting, handling: type[InPlace | FromHost]) -> str:
    """The name under which the figures are."""
    return f"{handling.name}: {workload}, {setting}"


def on_cpu(document: Document, transformer: Workload, others: Sequence[Scenario]) -> list[Claim]:
    """Of a whole training step of a small transformer; elsewhere that nothing is slower or larger than with PEFT."""
    claims = []
    for dropout in (0.0, 0.05):
        scenario = str(Scenario(transformer, Setting("bf16", dropout)))
        ratio = document.step_ratio(scenario, OURS, PEFT, optimizer="8-bit")
        claims.append(Claim(f"{scenario}: a whole training step, 1.2 times as fast: ours / PEFT", ratio, 1 / 1.2))
    for scenario in map(str, others):
        ratio = document.step_ratio(scenario, OURS, PEFT, optimizer="8-bit")
        claims.append(Claim(f"{scenario}: a whole training step, ours / PEFT", ratio, 1.0))
        claims.append(Claim(f"{scenario}: peak memory, ours / PEFT", document.ratio(scenario, OURS, PEFT, "peak"), 1.0))
    return claims


def on_cuda(document: Document, large: Workload, short: Workload) -> list[Claim]:
    """The figures promised at the shape of Llama-2-7B, on one GPU."""
    return [*_speed(document, large), *_few_tokens(document, short), *_memory(document, large), *_once(document, large)]


def _speed(document: Document, large: Workload) -> list[Claim]:
    claims = []
    for (kind, setting), floor in zip(KINDS.items(), (1.10, 1.14), strict=True):
        scenario = str(Scenario(large, setting))
        claims += [
            Claim(f"{kind}, eager: ours / frozen floor", document.step_ratio(scenario, OURS, FLOOR), floor),
            Claim(
                f"{kind}, eager: 1.5 times as fast as PEFT's default, ours / PEFT",
                document.step_ratio(scenario, OURS, PEFT),
                1 / 1.5,
            ),
        ]
    lora, qlora = (str(Scenario(large, setting)) for setting in (LORA, QLORA))
    ratio = document.step_seconds(qlora, OURS) / document.step_seconds(lora, PEFT_BF16)
    return [*claims, Claim("our QLoRA is no slower than PEFT's LoRA with bf16 adapters, ours / PEFT", ratio, 1.0)]


def _few_tokens(document: Document, short: Workload) -> list[Claim]:
    claims = []
    for kind, setting in KINDS.items():
        scenario = str(Scenario(short, setting))
        for optimizer in ("8-bit", "fused"):
            told = f"{kind}, {short.tokens} tokens, with the step of {optimizer} AdamW"
            ratio = document.step_ratio(scenario, OURS, PEFT, optimizer=optimizer)
            claims.append(Claim(f"{told}: twice as fast in eager mode, ours / PEFT", ratio, 1 / 2))
            for how, name in ANSWERS.items():
                ratio = document.step_ratio(scenario, name, PEFT, optimizer=optimizer)
                claims.append(Claim(f"{told}: three times as fast, ours by {how} / PEFT", ratio, 1 / 3))
    return claims


def _memory(document: Document, large: Workload) -> list[Claim]:
    limits = {("LoRA", 0.0): 0.75, ("QLoRA", 0.0): 0.70, ("LoRA", 0.05): 0.65, ("QLoRA", 0.05): 0.60}
    claims = []
    for (kind, dropout), limit in limits.items():
        scenario = str(Scenario(large, Setting(KINDS[kind].base, dropout)))
        told = f"{kind}{f', dropout {dropout:g}' if dropout else ''}: peak memory, ours / PEFT"
        claims.append(Claim(told, document.ratio(scenario, OURS, PEFT, "peak"), limit))
    scenario = str(Scenario(large, Setting("nf4", checkpointing=True)))
    peak = document.figure(scenario, "ours, chunked loss", "peak") / 2**30
    told = f"QLoRA, {large.tokens} tokens, checkpointing and chunked loss: peak memory, GiB"
    return [*claims, Claim(told, peak, 6.0)]


def _once(document: Document, large: Workload) -> list[Claim]:
    in_place, from_host = (of_handling(large, QLORA, handling) for handling in (InPlace, FromHost))
    host = {what: document.figure(from_host, OURS, what) for what in ("seconds", "size", "peak", "largest layer")}
    return [
        Claim("saving the adapter, s", document.figure(in_place, OURS, "save"), 0.2),
        Claim("merging NF4 into bf16, s", document.figure(in_place, OURS, "merge"), 0.5),
        Claim("quantizing from pinned memory of the host, s", host["seconds"], 4.0),
        Claim(
            f"its peak beyond what is left ({host['size'] / MIB:.0f} MiB), in units of the largest layer",
            (host["peak"] - host["size"]) / host["largest layer"],
            1.0,
        ),
    ]
