"""Print which methods go with which layers and storages, by trying: ``python -m tests.conformance.table``."""

from __future__ import annotations

from lightning_lora.callbacks.settings import METHODS
from tests.conformance.combinations import KINDS, STORAGES, every_combination, refusal


def table() -> str:
    """A Markdown table; a cell lists the storages of the base, a method's starts stand in its last column."""
    allowed = [c for c in every_combination() if refusal(c) is None]
    rows = [["method", *KINDS, "init"], ["---"] * (len(KINDS) + 2)]
    for method in METHODS:
        mine = [c for c in allowed if c.method == method]
        cells = [
            ", ".join(s for s in STORAGES if any((c.kind, c.storage) == (kind, s) for c in mine)) for kind in KINDS
        ]
        starts = ", ".join(dict.fromkeys(c.init for c in mine if c.init))
        rows.append([f"`{method}`", *(cell or "-" for cell in cells), starts or "-"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
