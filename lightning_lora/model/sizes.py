"""Sizes of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes that ``"24GB"`` (10^9 each) or ``"24GiB"`` (2^30 each) stands for.

    Raises:
        ValueError: If it stands for nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size; write 24GB (24 x 10^9 bytes) or 24GiB (24 x 2^30)")
    return size
