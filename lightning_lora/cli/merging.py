"""``lightning-lora merge``: an adapter folder into the files of its base model."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from lightning_lora.cli import console
from lightning_lora.io.merge_files import MergeReport, merge_files
from lightning_lora.quantization.formats import from_storage, quantized_linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(options: argparse.Namespace) -> int:
    """Merge, and say what was merged into what."""
    report = merge_files(
        options.base,
        options.adapter,
        options.out,
        quantizer=quantized,
        onto=options.onto,
        max_shard_size=options.max_shard_size,
        dtype=DTYPES.get(options.dtype),
        allow_base_mismatch=options.allow_base_mismatch,
    )
    for line in told(report):
        console.line(line)
    console.line(f"wrote {options.out}")
    return 0


def quantized(layer: nn.Module, words: str) -> nn.Module:
    """The layer as it was in training; what its storage cannot hold was not quantized then either."""
    return quantized_linear(layer, from_storage(words)) if isinstance(layer, nn.Linear) else layer


def told(report: MergeReport) -> list[str]:
    """What a user has to know of a merge."""
    stored = sorted(set(report.trained_on.values()) - {"none"})
    lines = [f"merged {len(report.layers)} layers"]
    if stored and not report.drift:
        lines[0] += f" into the weights trained on ({', '.join(stored)}, dequantized)"
    if report.drift:
        worst = max(report.drift, key=report.drift.__getitem__)
        mean = sum(report.drift.values()) / len(report.drift)
        lines[0] += f" into the original weights, while training was on {', '.join(stored)}"
        differ, remedy = "differ", "Without --onto original the merged model is the trained function"
        if report.started:
            differ, remedy = "may differ", "export_merged(model, ...) writes the trained function"
        lines.append(
            f"drift: the weights {differ} from those trained on by {mean:.2%} on average and {report.drift[worst]:.2%} "
            f"at most ({worst}). {remedy}"
        )
    return lines
