"""The demo's pictures: the loss curve, and where the bytes are.

They need matplotlib (extra ``plot``); without it none are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.cli.plot import memory
from lightning_lora.cli.plot.style import LINES, figure, save, styled
from lightning_lora.errors import UnsupportedError
from lightning_lora.metrics.memory import MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(out: Path, losses: list[float], report: dict[str, Any]) -> list[str]:
    """Draw ``loss.png`` and ``memory.png`` and return the names of the files written."""
    try:
        with styled():
            save(_loss_curve(losses, report), out / "loss.png")
            save(_memory(report), out / "memory.png")
    except UnsupportedError:
        return []
    return ["loss.png", "memory.png"]


def _loss_curve(losses: list[float], report: dict[str, Any]) -> Figure:
    made = figure(3.6)
    axes = made.subplots()
    axes.plot(losses, color="#b0b0b0", linewidth=0.7, label="training, each step")
    width = max(len(losses) // 20, 1)
    windows = [losses[max(0, i + 1 - width) : i + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    axes.plot(smooth, color=LINES[1]["color"], linewidth=2, label=f"training, mean of {width} steps")
    ends = (0, len(losses) - 1), (report["held_out_before"], report["held_out_after"])
    axes.plot(*ends, "s", color="#000000", markersize=6, label="held-out, before and after")
    for x, y, side, away in zip(*ends, ("right", "left"), (-7, 7), strict=True):  # beside the curve, not on it
        axes.annotate(f"{y:.2f}", (x, y), (away, 0), textcoords="offset points", ha=side, va="center")
    axes.margins(x=0.08)
    axes.set(xlabel="step", ylabel="bits per byte", title=f"QLoRA of the demo model on {report['text']}")
    axes.legend()
    return made


def _memory(report: dict[str, Any]) -> Figure:
    adapter, dense = report["adapter_bytes"], report["base_bytes_float32"]
    bars = {
        "full fine-tuning\n(fp32, AdamW)": {"base": dense, "gradients": dense, "optimizer": 2 * dense},
        "LoRA\n(fp32 base, AdamW)": {
            "base": dense,
            "adapters": adapter,
            "gradients": adapter,
            "optimizer": 2 * adapter,
        },
        "QLoRA\n(this run)": {
            "base": report["base_bytes"],
            "adapters": adapter,
            "gradients": 4 * report["trainable"],
            "optimizer": report["optimizer"]["state_bytes"],
        },
    }
    return memory.draw(
        {label: {part: size / MIB for part, size in sizes.items()} for label, sizes in bars.items()},
        title="What training has to hold",
        note=" for the adapted layers; first two bars computed, last one measured",
    )
