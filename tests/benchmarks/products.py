"""The six products of rank ``r`` that an adapter adds to a frozen layer's step, by themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def six_products(A: Tensor, B: Tensor, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return what makes them, each in the layout that is fastest on CPUs, with no graph around them.

    Args:
        A: Of shape ``(R, I)``.
        B: Of shape ``(O, R)``.
        x: Of shape ``(T, I)``.
        grad: Of the output, of shape ``(T, O)``.
    """
    y, dx = torch.zeros_like(grad), torch.zeros_like(x)

    def narrow(rows: Tensor, factor: Tensor) -> Tensor:
        return (factor @ rows.T).T if x.dtype == torch.bfloat16 else rows @ factor.T

    def make() -> None:
        down, grad_down = narrow(x, A), narrow(grad, B.T)
        y.addmm_(down, B.T)
        dx.addmm_(grad_down, A)
        for narrow_rows, rows in ((grad_down, x), (down, grad)):
            torch.mm(narrow_rows.T, rows)

    return make
