"""Activation memory that q, k and v projections of one x hold for the backward pass, beside PEFT's, on the CPU.

The unit is one x in bf16: a [512, 2048] tensor of 2 MiB. Counted is what autograd saves (saved_tensors_hooks), each
storage once, without parameters, buffers and x itself, which the layer before holds anyway. What remains is what
adapting these three layers costs in every layer of a network, for as long as the backward pass has not come by.

As a check on the count, "alive" is measured in another way: the storages made during the forward pass that are still
there after it, outputs aside. It would show what a custom autograd function keeps without telling autograd.

Dropout here is the CPU's, whose mask has the dtype of x; on CUDA the mask is one byte per element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from contenders import Adapted, Case, draw, ours, theirs
from report import Cell, Claim, Report, command, run
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = ("q_proj", "k_proj", "v_proj")
CASES = [Case(base, dropout) for base in ("bf16", "nf4") for dropout in (0.0, 0.05)]
CONTENDERS: dict[str, Callable[..., dict[str, Adapted]]] = {"ours": ours, "PEFT": theirs}


def measure(repeats: int) -> Report:
    """Count for every case; counting is exact, so each further repeat only has to agree."""
    rows: list[list[Cell]] = []
    claims = []
    for case in CASES:
        found = {name: count(case, make) for name, make in CONTENDERS.items()}
        for _ in range(repeats - 1):
            assert found == {name: count(case, make) for name, make in CONTENDERS.items()}
        rows.append(
            [str(case), *(cell for name in CONTENDERS for cell in found[name]), found["ours"][0] / found["PEFT"][0]]
        )
        each = found["ours"][0] / len(LAYERS)
        claims.append(Claim(f"{case}: an adapted layer saves next to nothing beyond x, in units of x", each, 0.05))
    return Report(
        title="Activations saved by q, k and v projections of one x (512 tokens, 2048 -> 2048, r=16)",
        command=command(__file__, repeats),
        columns=["base", "ours, x", "ours alive, x", "PEFT, x", "PEFT alive, x", "ours / PEFT"],
        rows=rows,
        claims=claims,
        note="In units of one x in bf16 (2 MiB), beyond x itself and the weights. *alive* counts the same by what is "
        "still allocated after the forward pass, outputs aside. *PEFT* is its default (adapters in fp32).",
    )


def count(case: Case, make: Callable[..., dict[str, Adapted]]) -> tuple[float, float]:
    """Return what one forward pass of all three layers saves, and what it leaves alive, in units of x."""
    torch.manual_seed(0)
    adapted = make(case, draw(case, LAYERS))
    x = torch.randn(case.tokens, case.width).to(case.dtype).requires_grad_()
    unit = x.numel() * x.element_size()
    known = {pointer(t) for t in [x, *held(adapted)]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if pointer(tensor) not in known:
            saved[pointer(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with Storages() as made, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [its.layer(x) for its in adapted.values()]
    alive = made.alive(besides=known | {pointer(y) for y in outputs})
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    factors = [factor for its in adapted.values() for factor in (its.A, its.B)]
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in [x, *factors])
    return sum(saved.values()) / unit, alive / unit


def pointer(tensor: Tensor) -> int:
    """Which storage a tensor looks at."""
    return tensor.untyped_storage().data_ptr()


def held(adapted: Mapping[str, Adapted]) -> Iterable[Tensor]:
    """The tensors that are there with or without a forward pass."""
    for its in adapted.values():
        yield from its.layer.parameters()
        yield from its.layer.buffers()


class Storages(TorchDispatchMode):
    """Remembers, without keeping them alive, the storages that operations make while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.data_ptr(), storage.nbytes())
        return result

    def alive(self, besides: set[int]) -> int:
        """Return the bytes of those still alive, other than at the given pointers."""
        live = {p: size for reference, p, size in self._made.values() if not reference.expired()}
        return sum(size for p, size in live.items() if p not in besides)


if __name__ == "__main__":
    run(__doc__, measure, repeats=1)
