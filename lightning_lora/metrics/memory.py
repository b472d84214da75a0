"""Memory: the most a process has used, what a model in training holds, and what a forward pass keeps for its backward.

They answer different questions and do not add up: the peak of a CPU process counts the interpreter and all libraries,
that of a GPU what PyTorch's allocator gave out, temporaries included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchmetrics import Metric

from lightning_lora.model.dequantized import kept_bytes
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.tensors import size_in_bytes, tensors

MIB = 2**20


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory used so far, in bytes.

    On a CUDA device ``torch.cuda.max_memory_allocated``: tensors of this process on that device, since it started or
    somebody reset the count. Elsewhere the high-water mark of the process's resident memory since it started
    (``VmHWM`` on Linux, ``ru_maxrss`` on other Unix systems). None on Windows, where neither is.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def _resident_peak() -> int | None:
    try:  # Linux hands ru_maxrss on from the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_name(device: torch.device) -> str:
    """What :func:`peak_memory` is of on a device: ``"cuda"`` or ``"rss"``."""
    return "cuda" if device.type == "cuda" else "rss"


class PeakMemory(Metric):
    """The largest :func:`peak_memory` in bytes, of all processes and of all times it was looked at."""

    full_state_update = False
    most: Tensor

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.add_state("most", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, device: torch.device) -> None:
        """Look at the memory of a device."""
        self.most = torch.maximum(self.most, self.most.new_tensor(peak_memory(device) or 0))

    def compute(self) -> Tensor:
        """Return the maximum."""
        return self.most


@dataclass(frozen=True)
class Holdings:
    """Bytes that a model in training holds from step to step.

    Attributes:
        base: Frozen parameters and buffers, quantized ones as stored, and weights that are kept dequantized.
        adapters: All adapters.
        trained: Parameters trained along with them.
        gradients: Gradients that are there now.
        optimizer: State of the optimizers.
    """

    base: int
    adapters: int
    trained: int
    gradients: int
    optimizer: int

    def to_dict(self) -> dict[str, int]:
        """The parts by name, in order."""
        return asdict(self)


def holdings(model: nn.Module, states: Iterable[Tensor] = ()) -> Holdings:
    """Count what a model and its optimizers hold; a tensor that stands in several places once.

    Args:
        model: With its gradients, if it has any.
        states: The tensors of the optimizers' states.
    """
    adapters = {id(t): t for layer in adapted_layers(model).values() for t in tensors(layer.adapters)}
    others = {id(t): t for t in tensors(model) if id(t) not in adapters}
    trained = {key: t for key, t in others.items() if t.requires_grad}
    return Holdings(
        base=size_in_bytes(t for key, t in others.items() if key not in trained) + kept_bytes(model),
        adapters=size_in_bytes(adapters.values()),
        trained=size_in_bytes(trained.values()),
        gradients=size_in_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=size_in_bytes({id(t): t for t in states}.values()),
    )


class SavedActivations:
    """Counts, as a context around a forward pass, the bytes that autograd keeps for the backward pass.

    Each piece of memory counts once, and the model's own parameters and buffers do not. What is computed is the same to
    the bit. Under activation checkpointing only what stands outside of it is seen, which is what is kept.

    Args:
        model: Whose parameters and buffers are left out.

    Attributes:
        bytes: The count so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in tensors(model)}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
