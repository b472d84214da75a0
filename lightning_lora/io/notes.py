"""What a user should know of a file although nothing is wrong: one line, by the first of several processes alone."""

from __future__ import annotations

import logging

from torch import distributed

_log = logging.getLogger("lightning_lora")


def tell(text: str) -> None:
    """Log a line as a warning, which is shown where nothing has set up logging."""
    several = distributed.is_available() and distributed.is_initialized()
    if not several or distributed.get_rank() == 0:
        _log.warning(text)
