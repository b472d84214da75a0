"""The demo's pictures: the loss curve, and where the bytes are.

They need matplotlib (extra ``plot``); without it none are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, GREY, RED, GOLD = "#2b6cb0", "#a0aec0", "#c53030", "#d69e2e"


def draw(out: Path, losses: list[float], report: dict[str, Any]) -> list[str]:
    """Draw ``loss.png`` and ``memory.png`` and return the names of the files written."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    _loss_curve(out / "loss.png", losses, report)
    _memory(out / "memory.png", report)
    return ["loss.png", "memory.png"]


def _loss_curve(path: Path, losses: list[float], report: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color=GREY, linewidth=0.8, label="training, each step")
    width = max(len(losses) // 20, 1)
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1]) for i in range(len(losses))
    ]
    axes.plot(smooth, color=BLUE, linewidth=2, label=f"training, mean of {width} steps")
    ends = (0, len(losses) - 1), (report["held_out_before"], report["held_out_after"])
    axes.plot(*ends, "o", color=RED, markersize=8, label="held-out, before and after")
    for x, y in zip(*ends, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(f"{y:.2f}", (x, y), (0, -18), textcoords="offset points", ha="center", color=RED, bbox=box)
    axes.set(xlabel="step", ylabel="bits per byte", title=f"QLoRA of the demo model on {report['text']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _memory(path: Path, report: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    adapter, trainable = report["adapter_bytes"], report["trainable"]
    dense, packed = report["base_bytes_float32"], report["base_bytes"]
    bars = {
        "full fine-tuning\n(fp32, AdamW)": (dense, 0, dense, 2 * dense),
        "LoRA\n(fp32 base, AdamW)": (dense, adapter, adapter, 2 * adapter),
        "QLoRA\n(this run)": (packed, adapter, 4 * trainable, report["optimizer"]["state_bytes"]),
    }
    parts = ("base weights", "adapters", "gradients", "optimizer state")
    styles = ((BLUE, ""), (GOLD, "//"), (GREY, ".."), (RED, "xx"))  # hatches: readable in black and white
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for row, sizes in enumerate(bars.values()):
        left = 0.0
        for part, size, (color, hatch) in zip(parts, sizes, styles, strict=True):
            label = part if row == 0 else None
            axes.barh(
                row, size / 2**20, left=left, color=color, hatch=hatch, edgecolor="white", height=0.6, label=label
            )
            left += size / 2**20
        axes.text(left, row, f" {left:.1f} MiB", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(
        xlabel="MiB for the adapted layers; first two bars computed, last one measured",
        title="What training has to hold",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
