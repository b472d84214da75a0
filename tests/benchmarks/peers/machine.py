"""Where a comparison runs: how memory is counted there, what is waited for, and what can be compiled or captured.

``Rehearsal`` is the CPU in the part of a GPU: every contender and measurement of a run on CUDA, at sizes of a toy.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "estimation"))
from allocations import Allocations, allocations


@dataclass(frozen=True)
class StepMemory:
    """What one forward and backward pass takes, beyond what was there before.

    Attributes:
        saved: Bytes that are still allocated after the forward pass.
        peak: The most bytes at once, with gradients that are made anew.
    """

    saved: int
    peak: int


class Machine(ABC):
    """A device and its ways."""

    device: ClassVar[torch.device]
    backend: ClassVar[str] = "inductor"
    """Of torch.compile."""

    warm_up: ClassVar[int] = 0
    """Rounds not counted, after each contender has made five passes to be compared and counted."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device has done what it was given."""

    @abstractmethod
    def allocations(self, act: Callable[[], object]) -> Allocations:
        """Return what ``act`` allocated."""

    @abstractmethod
    def clock(self) -> Callable[[], float]:
        """Return what steps are timed with."""

    @abstractmethod
    def tidy(self) -> None:
        """Give back what nobody holds."""

    @abstractmethod
    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the step with one launch."""

    @abstractmethod
    def on_host(self, model: nn.Module) -> None:
        """Bring the model to the memory weights are loaded into, from which the device copies fastest."""

    @abstractmethod
    def cannot_compile(self) -> str | None:
        """Return why torch.compile does not work here, or None."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return what figures depend on, beside versions."""

    def finished(self, act: Callable[[], object]) -> Callable[[], None]:
        """Return a call of ``act`` that waits for its end."""

        def call() -> None:
            act()
            self.wait()

        return call

    def step_memory(self, forward: Callable[[], Tensor], step: Callable[[], None]) -> StepMemory:
        """Count the memory of a forward pass by itself, and of a whole step."""
        kept: list[Tensor] = []
        saved = self.allocations(lambda: kept.append(forward())).kept
        kept.clear()
        return StepMemory(saved, self.allocations(step).peak)


class Cpu(Machine):
    """The CPU: allocations are those the profiler sees."""

    device = torch.device("cpu")

    def wait(self) -> None:
        pass

    def allocations(self, act: Callable[[], object]) -> Allocations:
        return allocations(act)

    def clock(self) -> Callable[[], float]:
        """The process's own, which stands while others have the processor; it adds up threads, so only of one."""
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def tidy(self) -> None:
        gc.collect()

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def on_host(self, model: nn.Module) -> None:
        pass

    @functools.cache  # noqa: B019 (one machine in a run)
    def cannot_compile(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            return "torch.compile needs a C++ compiler here, and there is none"
        return None

    def describe(self) -> dict[str, str]:
        return {"clock": self.clock().__name__}


class Rehearsal(Cpu):
    """The CPU, where nothing is to be learnt but whether all of it runs."""

    backend = "aot_eager"

    def cannot_compile(self) -> str | None:
        return None


class Cuda(Machine):
    """One GPU: memory is what PyTorch's allocator gives out."""

    device = torch.device("cuda", 0)
    warm_up = 2

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def allocations(self, act: Callable[[], object]) -> Allocations:
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        act()
        self.wait()
        peak, now = torch.cuda.max_memory_allocated(self.device), torch.cuda.memory_allocated(self.device)
        return Allocations(peak=peak - before, kept=now - before)

    def clock(self) -> Callable[[], float]:
        return time.perf_counter

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and chosen, which cannot be captured
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def on_host(self, model: nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        torch.cuda.empty_cache()

    def cannot_compile(self) -> str | None:
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch.compile needs Triton here, and it is not installed"

    def describe(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "CUDA": str(torch.version.cuda),
        }


def held(tensors: Any) -> int:
    """Return the bytes of tensors and of what is inside them, each storage once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for part in _inside(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _inside(tensor: Any) -> list[Tensor]:
    """The plain tensors of which a parameter consists: subclasses, and bitsandbytes' with their constants beside."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _inside(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    nested = [state.state2] if state is not None and state.nested else []
    constants = [part for each in (state, *nested) if each is not None for part in (each.absmax, each.code)]
    return [tensor, *constants, *([state.offset] if nested else [])]
