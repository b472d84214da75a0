"""Packages imported when they are first needed: ``import lightning_lora`` stays quick and works without them."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

from lightning_lora.errors import UnsupportedError


def huggingface_hub(purpose: str) -> ModuleType:
    """Import huggingface_hub.

    Args:
        purpose: What asked for it: ``push_adapter``.

    Raises:
        UnsupportedError: If it is not installed.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UnsupportedError(
            f'{purpose} needs huggingface_hub ({error}). Install it with: pip install "lightning-lora[hub]"'
        ) from error


def bitsandbytes(purpose: str) -> ModuleType:
    """Import bitsandbytes.

    On processors with AVX512-BF16 its import reports a missing inference kernel that this package never calls, so its
    log is held back while it loads.

    Args:
        purpose: What asked for it, as the user wrote it: ``quantization='nf4'``.

    Raises:
        UnsupportedError: If bitsandbytes is not installed.
    """
    loaded = sys.modules.get("bitsandbytes")
    if loaded is not None:
        return loaded
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UnsupportedError(
            f"{purpose} needs bitsandbytes, which cannot be imported ({error}). "
            'Install it with: pip install "bitsandbytes>=0.50,<0.52". '
            "Without it, use quantization=None and optimizer=None (plain LoRA)."
        ) from error
    finally:
        log.setLevel(level)
