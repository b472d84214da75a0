"""Which workloads run in which setting, by whom: on the CPU, on a GPU, and as a rehearsal of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peers.by_peft import Peft, PeftBf16
from peers.by_torchtune import Torchtune
from peers.compiled import Compiled
from peers.contender import Contender, Setting
from peers.decoder import LLAMA_2_7B, Decoder, DecoderShape
from peers.floor import Floor, FloorAndProducts
from peers.ours import Ours, OursChunked, OursGraphed
from peers.vision import VIT_BASE, VIT_LARGE, VisionShape, VisionTransformer
from peers.workload import Workload

EAGER: tuple[Contender, ...] = (Peft(), PeftBf16(), Ours(), Torchtune(), Floor())
"""PEFT comes first: the others are held to what it computes."""

ADAPTING = EAGER[:-1]
"""Those that do something to the model."""

QUANTIZING: tuple[Contender, ...] = (Peft(), Ours())
"""Those whose weights in NF4 are the same bits."""

COMPILED: tuple[Contender, ...] = (Compiled(Peft()), Compiled(Ours()))


@dataclass(frozen=True)
class Scenario:
    """One table: a workload in a setting, and who takes part."""

    workload: Workload
    setting: Setting
    contenders: tuple[Contender, ...] = EAGER

    def __str__(self) -> str:
        return f"{self.workload}, {self.setting}"


def settings(bases: Sequence[str] = ("bf16", "nf4")) -> list[Setting]:
    """Return each base with and without dropout, with and without checkpointing."""
    return [
        Setting(base, dropout, checkpointing)
        for base in bases
        for checkpointing in (False, True)
        for dropout in (0.0, 0.05)
    ]


def scenarios(workload: Workload, few: Workload | None = None, *, chunked: bool = True) -> list[Scenario]:
    """Return all settings of a workload, and those without dropout and checkpointing of one with ``few`` tokens."""
    made = []
    for setting in settings():
        more: tuple[Contender, ...] = ()
        if setting == Setting(setting.base):
            more = COMPILED
        if setting.checkpointing and not setting.dropout and chunked:
            more = (OursChunked(),)
        made.append(Scenario(workload, setting, EAGER + more))
    if few is not None:
        made += [Scenario(few, Setting(base), (*EAGER, *COMPILED, OursGraphed())) for base in ("bf16", "nf4")]
    return made


TRANSFORMER = Decoder(DecoderShape(1024, 2816, 4, 8, 2048), 1, 512)
STACK = Decoder(DecoderShape(2048, 5632, 2, 16, 4096), 1, 256)
LARGE, SHORT = Decoder(LLAMA_2_7B, 4, 1024), Decoder(LLAMA_2_7B, 1, 512)
IMAGES = VisionTransformer(replace(VIT_BASE, layers=4), 4)
MANY_IMAGES = VisionTransformer(VIT_LARGE, 32)
TOY = DecoderShape(128, 256, 1, 2, 128)
TOY_VISION = VisionShape(128, 256, 1, 2, 32)

CPU = [
    *(Scenario(TRANSFORMER, Setting("bf16", dropout), (*EAGER, FloorAndProducts())) for dropout in (0.0, 0.05)),
    *scenarios(STACK),
    *(Scenario(IMAGES, Setting(base)) for base in ("bf16", "nf4")),
]
CUDA = [
    *scenarios(LARGE, SHORT),
    *(Scenario(MANY_IMAGES, Setting(base), EAGER + COMPILED) for base in ("bf16", "nf4")),
]


def toy(workload: Workload) -> Workload:
    """Return the workload at the sizes of a toy; different ones stay different."""
    if isinstance(workload, Decoder):
        layers = 2 if workload.shape == TRANSFORMER.shape else 1
        return Decoder(replace(TOY, layers=layers), workload.rows, workload.length // 64)
    return VisionTransformer(TOY_VISION, 2)
