"""Weights of experts stacked in one parameter, as mixture-of-experts models hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora.nn.init import INITIALIZERS
from lightning_lora.nn.kind import Kind


@dataclass(frozen=True)
class ExpertsKind(Kind):
    """``W_e`` for each of ``E`` experts: a parameter of shape ``(E, O, I)``, or ``(E, I, O)`` where it is transposed.

    The module that holds it multiplies with it in its own code, so nothing is known of inputs and outputs here. To a
    method this is no matrix; LoRA has factors for each expert (:mod:`lightning_lora.nn.expert_lora`).

    Attributes:
        experts: ``E``.
        transposed: Whether the module stores ``W_e^T``.
    """

    name: ClassVar[str] = "experts"

    experts: int = 1
    transposed: bool = False

    def check(self, config: Any) -> None:
        """Raise ``ValueError`` unless the method is LoRA, without dropout, started by chance."""
        if config.method != "lora":
            raise ValueError(f"experts can be adapted with LoRA only, not with {config.method}")
        if config.dropout:
            raise ValueError("the inputs of experts are out of reach, so nothing can be dropped out; use dropout=0")
        if config.init not in INITIALIZERS:
            raise ValueError(f"experts start by chance, not with init={config.init!r}; use {', '.join(INITIALIZERS)}")

    def add_low_rank(self, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Raise: there is no call with an input."""
        raise TypeError("a stack of experts is read, not called")

    def along_outputs(self, vector: Tensor, y: Tensor) -> Tensor:
        """Raise: there is no call with an output."""
        raise TypeError("a stack of experts is read, not called")

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return the matrices ``(E, O, I)``."""
        return weight.transpose(1, 2) if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return the stack as the module stores it."""
        return matrix.transpose(1, 2).contiguous() if self.transposed else matrix


class StackedWeight(nn.Module):
    """One stacked parameter as a layer of its own, so that adapters can stand on it. It is read and not called.

    Attributes:
        weight: Of shape ``(E, O, I)``, or ``(E, I, O)`` where it is transposed.
        transposed: Whether it is.
    """

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, *, transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    @property
    def kind(self) -> ExpertsKind:
        """Its sizes."""
        return experts_kind(tuple(self.weight.shape), transposed=self.transposed)

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return f"{tuple(self.weight.shape)}"


def experts_kind(shape: tuple[int, ...], *, transposed: bool) -> ExpertsKind:
    """Return the kind of a stack stored in this shape."""
    experts, rows, columns = shape
    out, into = (columns, rows) if transposed else (rows, columns)
    return ExpertsKind(into, out, experts=experts, transposed=transposed)
