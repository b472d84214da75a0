"""What a copy of a callback takes along: how it is set, and nothing of the run it is in.

A Trainer that tunes, and tools that fit many times, copy or pickle callbacks; with the run would go Trainer and model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback

_PUT_THERE_BY_LIGHTNING = ("log", "log_dict")


class CopiedAsSet(Callback, ABC):
    """A callback of which a copy is as new, and set in the same way.

    Attributes:
        of_a_run: Names of the attributes that :meth:`_begin` sets.
    """

    of_a_run: ClassVar[tuple[str, ...]]

    def __getstate__(self) -> dict[str, Any]:
        """How this callback is set."""
        left = (*self.of_a_run, *_PUT_THERE_BY_LIGHTNING)
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be as new, and set in the same way."""
        vars(self).update(state)
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Set what belongs to a run to what it is before one."""
