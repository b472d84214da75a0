"""Memory that quantize(model) needs beyond the model as it stands, and what a weight takes once quantized (Linux).

The extra peak is the highest resident memory of the process during the call, less what was resident before it. The
kernel keeps that mark (VmHWM) and resets it on request (5 written to /proc/self/clear_refs). Each measurement has a
process of its own, so that memory left over by an earlier one cannot serve the next; a small layer is quantized first,
so that loading bitsandbytes is not counted.

The promise: layers are quantized one at a time, and the extra never exceeds the bytes of the largest.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from report import Cell, Claim, Report, command, run
from torch import nn

from lightning_lora import LoRAConfig, NF4Config, inject, quantize
from lightning_lora.model.layers import adapted_layers
from lightning_lora.nn.base import QuantizedLinear

MIB = 2**20
SQUARE = (4096, 4096)
STACKS: dict[str, tuple[torch.dtype, list[tuple[int, int]]]] = {
    "6 x 4096x4096 fp32": (torch.float32, [SQUARE] * 6),
    "6 x 4096x4096 bf16": (torch.bfloat16, [SQUARE] * 6),
    "5 x 4096x4096, 1 x 8192x4096 fp32": (torch.float32, [SQUARE] * 3 + [(8192, 4096)] + [SQUARE] * 2),
    "5 x 4096x4096, 1 x 8192x4096 bf16": (torch.bfloat16, [SQUARE] * 3 + [(8192, 4096)] + [SQUARE] * 2),
}
BITS = {True: 4.13, False: 4.50}
"""Bits per weight claimed, with and without double quantization."""


def measure(repeats: int) -> Report:
    """Measure every stack in fresh processes, and the storage of one layer."""
    rows: list[list[Cell]] = []
    claims = []
    for name, (dtype, shapes) in STACKS.items():
        extra, before, after = (statistics.median(x) for x in zip(*(alone(name) for _ in range(repeats)), strict=True))
        largest = max(o * i for o, i in shapes) * dtype.itemsize
        rows.append([name, before / MIB, after / MIB, largest / MIB, extra / MIB, extra / largest])
        claims.append(
            Claim(f"{name}: the extra peak is at most the largest layer, extra / largest", extra / largest, 1.0)
        )
    for double_quant, limit in BITS.items():
        which = "with" if double_quant else "without"
        claims.append(Claim(f"bits per weight {which} double quantization", stored_bits(double_quant), limit))
    return Report(
        title="Peak memory of quantize(model), and storage of NF4",
        command=command(__file__, repeats),
        columns=["layers", "before, MiB", "after, MiB", "largest layer, MiB", "extra peak, MiB", "extra / largest"],
        rows=rows,
        claims=claims,
        note="Resident memory of the whole process. *extra peak* is the highest during the call less *before*.",
    )


def alone(stack: str) -> tuple[int, int, int]:
    """Measure one stack in a process of its own: bytes of extra peak, resident before, resident after."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(extra_peak, (stack,))


def extra_peak(stack: str) -> tuple[int, int, int]:
    """Quantize a stack in this process and return bytes of extra peak, resident before, resident after."""
    quantize(adapted(torch.float32, [(64, 64)]))
    model = adapted(*STACKS[stack])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    quantize(model)
    peak, after = status("VmHWM"), status("VmRSS")
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in adapted_layers(model).values())
    return peak - before, before, after


def adapted(dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> nn.Module:
    """Return a stack of adapted linear layers of shapes ``(O, I)``, with weights in touched memory."""
    layers = [nn.Linear(in_, out, bias=False, dtype=dtype) for out, in_ in shapes]
    return inject(nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)}), "layer*", LoRAConfig(r=16))


def stored_bits(double_quant: bool) -> float:
    """Return the bits per weight that one quantized layer keeps: codes and all its constants."""
    model = quantize(adapted(torch.bfloat16, [SQUARE]), NF4Config(double_quant=double_quant))
    base = next(iter(adapted_layers(model).values())).base_layer
    stored = sum(t.numel() * t.element_size() for t in [*base.parameters(), *base.buffers()])
    return 8 * stored / (SQUARE[0] * SQUARE[1])


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}; this benchmark needs Linux"
    return 1024 * int(found[1])


if __name__ == "__main__":
    run(__doc__, measure, repeats=3)
