"""Sizes of memory and of files as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}


def parse_size(argument: str, text: object) -> int:
    """Return the bytes that ``"24GB"`` (10^9 each) or ``"24GiB"`` (2^30 each) stands for.

    Args:
        argument: What it was given as, for the error.
        text: The size.

    Raises:
        ValueError: If it stands for nothing; a number alone does not say of what.
    """
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise ValueError(f"{argument}={text!r} is no size; write 24GB (24 x 10^9 bytes) or 24GiB (24 x 2^30)")
    return size


def as_bytes(argument: str, size: int | str) -> int:
    """Do as :func:`parse_size`, and take a number alone for bytes, as ``max_shard_size`` does everywhere.

    Raises:
        ValueError: If it is none, or not above 0.
    """
    return parse_size(argument, f"{size}B" if str(size).strip().isdecimal() else size)
