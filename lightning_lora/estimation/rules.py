"""The table that is quoted most for the memory of fine-tuning: LLaMA-Factory's, which calls its figures *estimated*.

A rule of thumb to be shown beside an estimate, in GB, never in its place: it knows no sequence, batch, rank or layer.
"""

from __future__ import annotations

import math

SIZES = {"7B": 6.74e9, "13B": 13.0e9, "30B": 32.5e9, "70B": 69.0e9, "8x7B": 46.7e9, "8x22B": 140.6e9}
"""The columns, with the parameters that models called so have."""

_ROWS = {
    "full": (60, 120, 300, 600, 400, 1200),
    "freeze": (20, 40, 80, 200, 160, 400),
    "lora": (16, 32, 64, 160, 120, 320),
    "qlora-8bit": (10, 20, 40, 80, 60, 160),
    "qlora-4bit": (6, 12, 24, 48, 30, 96),
    "qlora-2bit": (4, 8, 16, 24, 18, 48),
}
TABLE = {method: dict(zip(SIZES, row, strict=True)) for method, row in (_ROWS | {
    "galore": _ROWS["lora"], "badam": _ROWS["lora"]
}).items()}  # fmt: skip
"""GB by method (in 16 bits where nothing else is said) and size."""

_NEAR = 1.2
"""A model is of a size up to this factor."""


def rule_of_thumb(method: str, parameters: int) -> tuple[str, int] | None:
    """Return the column and the GB of the table for a model, or None where it has none.

    Args:
        method: As in :class:`lightning_lora.estimation.setup.Setup`.
        parameters: Of the model.
    """
    if method not in TABLE or parameters < 1:
        return None
    size = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / parameters)))
    return (size, TABLE[method][size]) if abs(math.log(SIZES[size] / parameters)) <= math.log(_NEAR) else None
