"""The errors a caller may want to tell apart.

A bad value (``r=-1``) is a plain ``ValueError`` or ``TypeError``. The classes here are for situations a program can act
on: they say what was given, what was found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable


class LoRAError(Exception):
    """Base class of every error below."""


class TargetError(LoRAError):
    """A target, exclude or train pattern does not fit the model."""


class AdapterError(LoRAError):
    """An adapter is absent, present already, or its file does not fit."""


class QuantizationError(LoRAError):
    """A base weight cannot be held in few bits."""


class LoadError(LoRAError):
    """The files of a base model are damaged, or do not fit the model they are loaded into."""


class OptimizerError(LoRAError):
    """The optimizer does not hold exactly what is trained, or cannot be swapped for an equal one."""


class CheckpointError(LoRAError):
    """A checkpoint is not one of ours, or belongs to another fine-tune."""


class MergeError(LoRAError):
    """Merging would not give the trained function; the model is left as it was."""


class GradientError(LoRAError):
    """No gradient reaches an adapter."""


class UnsupportedError(LoRAError):
    """The Trainer is set up in a way this version cannot honour."""


def listing(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message, cutting long lists: ``a, b, c and 9 more``."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
