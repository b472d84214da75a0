"""Keeping what was computed from parameters until the next optimizer step, without ever serving what is stale.

The version counter of a tensor alone would not tell: torch's fused AdamW and all of bitsandbytes' optimizers write
parameters without raising it. So steps are counted too, for every optimizer there is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    global _steps
    _steps += 1


# At import, so that an unpickled model counts steps too. It costs one addition in each step of each optimizer.
register_optimizer_step_post_hook(_count_step)


class OncePerStep:
    """One value with the state of the tensors it was computed from.

    It is computed anew after an optimizer step, and once a tensor was written in place, replaced, moved or cast, or
    training was switched to evaluation or back: averages are swapped in there by writing to ``parameter.data``, which
    leaves no trace. A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(self, sources: Sequence[Tensor], training: bool, compute: Callable[[], Tensor]) -> Tensor:
        """Return what ``compute`` returns, or did when ``sources`` and the mode were as they are now."""
        if self._kept is not None and self._kept.holds(sources, training):
            return self._kept.value
        with torch.inference_mode(False), torch.no_grad():  # a value from inference mode could not be trained on
            value = compute()
        self._kept = _Kept.of(value, sources, training)
        return value

    def forget(self) -> None:
        """Drop the value."""
        self._kept = None

    def __reduce__(self) -> tuple[type[OncePerStep], tuple[()]]:
        return OncePerStep, ()


@dataclass(frozen=True)
class _Kept:
    """A value, and when it was computed from what; tensors by weak reference, so that none is kept alive."""

    value: Tensor
    sources: tuple[tuple[weakref.ref[Tensor], int, int], ...]
    training: bool
    step: int

    @classmethod
    def of(cls, value: Tensor, sources: Sequence[Tensor], training: bool) -> _Kept | None:
        try:
            states = tuple((weakref.ref(t), t.data_ptr(), t._version) for t in sources)
        except RuntimeError:  # inside a transform of torch.func there is no storage, in inference mode no version
            return None
        return cls(value, states, training, _steps)

    def holds(self, sources: Sequence[Tensor], training: bool) -> bool:
        if (self.step, self.training, len(self.sources)) != (_steps, training, len(sources)):
            return False
        return all(
            known() is t and t.data_ptr() == address and t._version == version
            for (known, address, version), t in zip(self.sources, sources, strict=True)
        )
