"""``lightning-lora demo``: a real QLoRA fine-tune by the real callback in a real Trainer, measured before and after."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.cli import console
from lightning_lora.cli.demo import pictures
from lightning_lora.cli.demo.model import LanguageModel
from lightning_lora.cli.demo.task import PROMPT, Task, Text
from lightning_lora.io.adapter_file import WEIGHTS
from lightning_lora.model.summary import Summary, summary
from lightning_lora.optim.report import OptimizerReport, optimizer_report

SAMPLE_BYTES = 150
BATCH = 8


@dataclass
class Observer(Callback):
    """Watches a run from outside: the loss of every step, and what the model is just before it is merged."""

    probe: Tensor
    losses: list[float] = field(default_factory=list)
    account: Summary | None = None
    optimizer: OptimizerReport | None = None
    adapted_logits: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss in bits."""
        self.losses.append(float(outputs["loss"]) / math.log(2))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what is compared with the merged model; this callback stands before the one that merges."""
        self.account = summary(pl_module)
        self.optimizer = optimizer_report(trainer.optimizers[0])
        self.adapted_logits = logits(pl_module, self.probe)


@dataclass(frozen=True)
class Scores:
    """Bits per byte on held-out text by its name, and a sample of what the model writes."""

    bits_per_byte: dict[str, float]
    sample: str


def run(task: Task, out: Path, *, steps: int, r: int = 8) -> dict[str, Any]:
    """Adapt ``task.network``, print what happened, and write adapter, merged weights, pictures and report to ``out``.

    Returns:
        The figures, as they stand in ``report.json``.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    seed_everything(0, verbose=False)
    console.line(f"{console.environment()} | no GPU needed")
    console.line(f"base: {task.name}, {sum(p.numel() for p in task.network.parameters()):,} parameters")
    before = _score(task)
    module = LanguageModel(task.network, lr=task.lr)
    observer = Observer(task.held_out.windows[:8, :-1])
    lora = LoRACallback(r=r, alpha=2 * r, output_dir=out)
    fit_seconds = _fit(module, task.train, [observer, lora], steps)
    after = _score(task)
    report = _report(task, observer, before, after, module, out)
    report |= {"losses": [round(loss, 4) for loss in observer.losses]}
    report |= {"fit_seconds": round(fit_seconds, 1), "seconds": round(time.perf_counter() - began, 1), "steps": steps}
    _show(report, before, after)
    drawn = pictures.draw(out, observer.losses, report)
    if not drawn:
        console.line('no pictures: they need matplotlib, pip install "lightning-lora[plot]"')
    files = drawn + _write(out, report, before, after)
    console.line(f"wrote {out}/: adapter_config.json, {WEIGHTS}, merged/model.safetensors, {', '.join(files)}")
    return report


def logits(module: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Evaluate without dropout or gradients, leaving the module's mode as it was."""
    training = module.training
    with torch.no_grad():
        values: Tensor = module.eval()(tokens.to(next(module.parameters()).device))
    module.train(training)
    return values.float().cpu()


def bits_per_byte(module: LanguageModel, text: Text) -> float:
    """Mean next-token cross-entropy in bits, per byte of text."""
    nats = count = 0.0
    for window in torch.split(text.windows, 16):
        scores = logits(module, window[:, :-1]).flatten(0, 1)
        nats += F.cross_entropy(scores, window[:, 1:].flatten(), reduction="sum").item()
        count += window[:, 1:].numel()
    return nats / count / math.log(2) / text.bytes_per_token


def _score(task: Task) -> Scores:
    module = LanguageModel(task.network, lr=0.0)
    texts = [task.held_out] + ([task.other] if task.other else [])
    task.network.eval()
    scores = Scores({text.name: bits_per_byte(module, text) for text in texts}, task.generate(SAMPLE_BYTES))
    task.network.train()
    return scores


def _fit(module: LanguageModel, text: Text, callbacks: list[Callback], steps: int) -> float:
    draws = RandomSampler(range(len(text.windows)), replacement=True, num_samples=BATCH * steps)  # one epoch, one bar
    loader = DataLoader(TensorDataset(text.windows), batch_size=BATCH, sampler=draws)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the demo tells the same in fewer words
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=1,
            callbacks=[*callbacks, console.progress_bar()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, loader)
    return time.perf_counter() - began


def _report(
    task: Task, observer: Observer, before: Scores, after: Scores, module: LanguageModel, out: Path
) -> dict[str, Any]:
    account, optimizer, adapted = observer.account, observer.optimizer, observer.adapted_logits
    assert account is not None
    assert optimizer is not None
    assert adapted is not None
    merged = logits(module, observer.probe)
    rounded = logits(_in_bfloat16(module, [layer.name for layer in account.layers]), observer.probe)
    text = task.held_out.name
    dense = sum(o * i for o, i in (layer.shape for layer in account.layers)) * 4
    return {
        "text": text,
        "held_out_before": before.bits_per_byte[text],
        "held_out_after": after.bits_per_byte[text],
        "change_percent": 100 * (after.bits_per_byte[text] / before.bits_per_byte[text] - 1),
        "other_before": {k: v for k, v in before.bits_per_byte.items() if k != text},
        "other_after": {k: v for k, v in after.bits_per_byte.items() if k != text},
        "base_storage": account.layers[0].storage,
        "adapted_layers": len(account.layers),
        "base_bytes": account.base_bytes,
        "base_bytes_float32": dense,
        "adapter_bytes": account.adapter_bytes,
        "trainable": account.trainable,
        "total": account.total,
        "optimizer": asdict(optimizer),
        "adapter_file_bytes": (out / WEIGHTS).stat().st_size,
        "merged_file_bytes": (out / "merged" / "model.safetensors").stat().st_size,
        "merged_vs_adapted": ((merged - adapted).abs().max() / adapted.abs().max()).item(),
        "merged_bf16_vs_adapted": _worst_sequence(rounded - adapted, adapted),
        "merged_bf16_vs_adapted_largest": ((rounded - adapted).abs().max() / adapted.abs().max()).item(),
    }


def _in_bfloat16(module: LanguageModel, layers: list[str]) -> LanguageModel:
    """A copy whose merged weights are rounded to bfloat16; everything else, and every product, stays as it is."""
    twin = LanguageModel(copy.deepcopy(module.network), lr=0.0)
    with torch.no_grad():
        for name in layers:
            weight = twin.get_submodule(name).get_parameter("weight")
            weight.copy_(weight.bfloat16())
    return twin


def _worst_sequence(difference: Tensor, logits: Tensor) -> float:
    """Largest relative difference, in the norm, of any sequence's logits."""
    return float((difference.flatten(1).norm(dim=1) / logits.flatten(1).norm(dim=1)).max())


def _show(report: dict[str, Any], before: Scores, after: Scores) -> None:
    rows = [
        (name, f"{old:.3f}", f"{after.bits_per_byte[name]:.3f}", f"{100 * (after.bits_per_byte[name] / old - 1):+.1f}%")
        for name, old in before.bits_per_byte.items()
    ]
    console.table("held-out bits per byte", ("text", "before", "after", "change"), rows)
    optimizer = report["optimizer"]
    share = report["base_bytes"] / report["base_bytes_float32"]
    console.table(
        "bytes in training",
        ("what", "how", "bytes"),
        [
            (
                f"{report['adapted_layers']} base layers",
                report["base_storage"],
                f"{report['base_bytes']:,} ({share:.0%} of fp32)",
            ),
            ("adapters", f"{report['trainable']:,} parameters, fp32", f"{report['adapter_bytes']:,}"),
            (
                "optimizer",
                f"{optimizer['name']}, {optimizer['in_8bit']} of {optimizer['tensors']} tensors in 8 bits, "
                f"{optimizer['paged']} paged",
                f"{optimizer['state_bytes']:,}",
            ),
        ],
    )
    console.line(f"before: {PROMPT + before.sample!r}")
    console.line(f"after:  {PROMPT + after.sample!r}")
    files = f"adapter file {report['adapter_file_bytes']:,} bytes, merged model {report['merged_file_bytes']:,} bytes"
    console.line(
        f"merged and adapted model agree: max relative logit difference {report['merged_vs_adapted']:.1e}; with merged "
        f"weights in bf16 {report['merged_bf16_vs_adapted']:.1e} in the norm of the worst sequence"
    )
    console.line(files)
    console.line(f"{report['steps']} steps in {report['fit_seconds']} s, {report['seconds']} s in all")


def _write(out: Path, report: dict[str, Any], before: Scores, after: Scores) -> list[str]:
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = "\n".join(
        f"| {name} | {old:.3f} | {after.bits_per_byte[name]:.3f} |" for name, old in before.bits_per_byte.items()
    )
    (out / "report.md").write_text(
        "# QLoRA demo\n\n| held-out text | bits/byte before | after "
        f"|\n|---|---|---|\n{rows}\n\nBefore:\n\n```\n{PROMPT}{before.sample}\n```\n\nAfter:\n\n```\n{PROMPT}{after.sample}\n```\n"
    )
    return ["report.json", "report.md"]
