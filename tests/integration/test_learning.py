"""Fine-tunes learn: LoRA and QLoRA on a tiny language model, next to full fine-tuning and to learning from scratch."""

import asyncio
import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, quantize
from lightning_lora.cli.demo import corpus
from lightning_lora.cli.demo.model import ByteLM, ByteLMConfig

CONTEXT = 64


def code() -> corpus.Corpus:
    """The sources of asyncio, the last file in eight held out."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    texts = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files]
    cut = len(files) * 7 // 8
    return corpus.Corpus(torch.cat(texts[:cut]), torch.cat(texts[cut:]))


def train(model: nn.Module, text: Tensor, steps: int, lr: float) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    windows = corpus.windows(text, CONTEXT)
    for _ in range(steps):
        loss = nats(model, windows[torch.randint(len(windows), (16,), generator=draw)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def nats(model: nn.Module, windows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@dataclass
class Losses:
    base: float
    full: float
    lora: float
    qlora: float
    scratch: float


@pytest.fixture(scope="module")
def losses() -> Losses:
    """Pretrain on English, adapt to code, and measure held-out code."""
    torch.manual_seed(0)
    target = code()
    held_out = corpus.windows(target.held_out, CONTEXT, limit=300)
    config = ByteLMConfig(width=64, depth=2, heads=4, context=CONTEXT)
    base = train(ByteLM(config), corpus.english().train, 500, 3e-3)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return nats(model, held_out).item()

    def adapted(*, packed: bool) -> nn.Module:
        torch.manual_seed(1)
        model = inject(copy.deepcopy(base), config=LoRAConfig(r=8, alpha=16))
        return quantize(model) if packed else model

    return Losses(
        base=score(base),
        full=score(train(copy.deepcopy(base), target.train, 200, 3e-3)),
        lora=score(train(adapted(packed=False), target.train, 200, 1e-2)),
        qlora=score(train(adapted(packed=True), target.train, 200, 1e-2)),
        scratch=score(train(ByteLM(config), target.train, 200, 3e-3)),
    )


def test_lora_closes_most_of_the_gap_to_full_fine_tuning(losses):
    print(losses)
    assert (losses.base - losses.lora) / (losses.base - losses.full) >= 0.60


def test_qlora_ends_where_lora_does(losses):
    assert abs(losses.qlora - losses.lora) < 0.03


def test_the_base_is_worth_adapting(losses):
    assert losses.lora < losses.scratch - 0.1
