"""Print what goes with which layers and storages, by trying: ``python -m tests.conformance.table``."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_lora.callbacks.settings import METHODS
from tests.conformance.combinations import INITS, KINDS, STORAGES, Combination, every_combination, refusal


def tables() -> list[str]:
    """Two Markdown tables, of methods and of LoRA's starts; a cell lists the storages of the base."""
    allowed = [c for c in every_combination() if refusal(c) is None]
    methods = {method: [c for c in allowed if c.method == method] for method in METHODS}
    starts = {init: [c for c in methods["lora"] if c.init == init] for init in INITS}
    return [_table("method", methods), _table("init", starts)]


def _table(what: str, rows: dict[str, list[Combination]]) -> str:
    cells = [[what, *KINDS], ["---"] * (len(KINDS) + 1)]
    cells += [
        [f"`{name}`", *(_storages(c for c in mine if c.kind == kind) for kind in KINDS)] for name, mine in rows.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _storages(combinations: Iterable[Combination]) -> str:
    found = {c.storage for c in combinations}
    return ", ".join(storage for storage in STORAGES if storage in found) or "-"


if __name__ == "__main__":
    print("\n\n".join(tables()))
