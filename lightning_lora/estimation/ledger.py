"""Which memory is in use while operations run: every piece of it from the moment it is made until nothing holds it.

A piece is a tensor's storage, however many views look at it. What an operation takes and gives back within itself is
not seen.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora.errors import UnsupportedError


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, as a context, bytes in use by label, now and at the moment when they were the most.

    Over tensors without values it also answers what a forward pass asks of values: a condition holds (``mask.all()``:
    nothing is masked), and a number of floating point, which is mostly written down, is NaN.

    Attributes:
        label: What tensors are put under that operations make from now on.
        peak: Bytes by label when they were the most in all.
    """

    def __init__(self, label: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = label
        self.peak: dict[str, int] = {}
        self._live: dict[int, tuple[str, int]] = {}
        self._now: dict[str, int] = {}
        self._total = self._most = 0

    def hold(self, tensor: Tensor, label: str | None = None) -> None:
        """Count a tensor, or put one that is counted already under a label."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            weakref.finalize(storage, self._give_back, key).atexit = False
        elif label is None and self._live[key][1] == size:
            return
        else:
            label = label or self._live[key][0]
            self._take(key)
        label = label or self.label
        self._live[key] = label, size
        self._now[label] = self._now.get(label, 0) + size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, dict(self._now)

    def now(self) -> dict[str, int]:
        """Bytes in use by label."""
        return dict(self._now)

    def _give_back(self, key: int) -> None:
        if key in self._live:
            self._take(key)
            del self._live[key]

    def _take(self, key: int) -> None:
        label, size = self._live[key]
        self._now[label] -= size
        self._total -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return result


def _answer(value: Tensor) -> bool | float:
    if value.is_floating_point():  # a loss that is written down; NaN becomes no size, and compares with nothing
        return math.nan
    if value.dtype != torch.bool:
        raise UnsupportedError(
            f"the forward pass reads a number of {value.dtype} out of a tensor (int(x), x.item()), and an estimate has "
            "sizes and no values. Give the model a step= that does not"
        )
    return True
