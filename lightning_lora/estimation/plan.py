"""A fine-tune planned to a budget: which of its open settings to choose so that a step fits, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_lora.errors import QuantizationError
from lightning_lora.estimation.estimate import Estimate
from lightning_lora.estimation.setup import BLOCKS, Setup
from lightning_lora.quantization.config import NF2Config, NF3Config, NF4Config, QuantizationConfig

STORAGES: tuple[QuantizationConfig | None, ...] = (None, NF4Config())
"""What is tried for a base, from the one that loses nothing on."""
FITTED_STORAGES: tuple[QuantizationConfig | None, ...] = (NF4Config(), NF3Config(), NF2Config())
"""The same where adapters start from what quantizing loses (``init="loftq"``), without which fewer bits than 4 train
another model."""


@dataclass(frozen=True)
class Choice:
    """What was tried, in order, and whether the last of it fits.

    Attributes:
        budget: Bytes.
        tried: Estimates of the setups tried; the last is the one that fits, if one does.
    """

    budget: int
    tried: tuple[Estimate, ...]

    @property
    def chosen(self) -> Setup | None:
        """The setup that fits, or None."""
        return self.tried[-1].setup if self.tried and self.tried[-1].total <= self.budget else None

    @property
    def least(self) -> Estimate:
        """What takes least of all that was tried."""
        return min(self.tried, key=lambda found: found.total)

    def __str__(self) -> str:
        rows = [("base under adapters", "activations", "needs", "")]
        rows += [(*_words(found.setup), size(found.total), self._verdict(found)) for found in self.tried]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"  {'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))}".rstrip()
            for row in rows
        )

    def _verdict(self, found: Estimate) -> str:
        return "chosen: the first that fits" if found.setup is self.chosen else "does not fit"


def ladder(setup: Setup, *, any_storage: bool, any_blocks: bool) -> list[Setup]:
    """Return the setups to try, from the one that costs least in quality, then in time.

    Args:
        setup: As asked for.
        any_storage: Whether how the base is stored is open; never below four bits unless adapters are fitted to it.
        any_blocks: Whether it is open if blocks are computed again, which changes nothing but the time.
    """
    configs = [setup.adapters, *(setup.targets.values() if not isinstance(setup.targets, str | tuple) else ())]
    fitted = any(config.starts_from == "quantization" for config in configs)
    storages: Sequence[QuantizationConfig | None] = FITTED_STORAGES if fitted else STORAGES
    blocks = (None, BLOCKS) if any_blocks else (setup.activation_checkpointing,)
    return [
        replace(setup, quantization=storage, activation_checkpointing=chosen)
        for storage in (storages if any_storage else (setup.quantization,))
        for chosen in blocks
    ]


def choose(setups: Iterable[Setup], estimate: Callable[[Setup], Estimate], budget: int) -> Choice:
    """Try setups until one fits.

    Args:
        setups: In the order of preference. One whose storage no layer can have is passed over, unless it is the only.
        estimate: Tells what a setup takes.
        budget: Bytes.

    Raises:
        QuantizationError: If no storage is possible.
    """
    tried: list[Estimate] = []
    refused: QuantizationError | None = None
    for setup in setups:
        try:
            tried.append(estimate(setup))
        except QuantizationError as error:
            refused = error
            continue
        if tried[-1].total <= budget:
            break
    if refused is not None and not tried:
        raise refused
    return Choice(budget, tuple(tried))


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.2f} MB"


def _words(setup: Setup) -> tuple[str, str]:
    base = "as it is" if setup.storage is None else setup.storage.storage
    return base, "kept" if setup.activation_checkpointing is None else "recomputed"
