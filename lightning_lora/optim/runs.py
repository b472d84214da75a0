"""Which parameters go into one update, and how they get there.

Parameters and gradients stay the tensors they are: whoever holds, saves, moves, copies or averages a parameter finds
nothing unusual. For an update that several share, both are laid behind one another in buffers that live for as long as
the update takes, in the memory that the activations have just left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from lightning_lora.errors import OptimizerError
from lightning_lora.optim.moments import BLOCK, Moments, padded


@dataclass(frozen=True)
class Joining:
    """When one update serves several parameters.

    Attributes:
        alone_from: Elements from which on a parameter is updated alone, and in place.
        limit: Elements of one update.
    """

    alone_from: int
    limit: int


# On a CPU an update is some fifteen passes over its operands. Joined, they leave the cache: it pays for parameters of
# less than 16,384 elements and is even there (docs/benchmarks/optimizer.md).
_CPU = Joining(alone_from=1 << 14, limit=1 << 22)
# On a GPU a launch is what costs. The limits bound the two buffers, to 256 MiB each in float32; r=16 on all linear
# layers of a model of 7B parameters are 40M elements.
_GPU = Joining(alone_from=1 << 24, limit=1 << 26)


def joining(device: torch.device) -> Joining:
    """What pays on a device, as measured."""
    return _CPU if device.type == "cpu" else _GPU


class Segment:
    """Where the moments of one parameter are, and how many updates they have seen."""

    def __init__(self, moments: Moments, start: int, elements: int) -> None:
        self.moments = moments
        self.start = start
        self.elements = elements
        self.step = 0

    @property
    def stop(self) -> int:
        """Where the next one starts."""
        return self.start + padded(self.elements)

    def tensors(self, shape: torch.Size) -> dict[str, Tensor]:
        """Views of the moments (of the parameter's shape) and of what they are stored with."""
        part = self.moments.part(self.start, self.elements)
        return {name: view.view(shape) if name.startswith("state") else view for name, view in part.items()}


class Run(ABC):
    """Parameters that one update serves, of one dtype, at one step, with moments one behind the other."""

    def __init__(self, parameters: Sequence[Tensor], segments: Sequence[Segment], elements: int) -> None:
        self.parameters = list(parameters)
        self.segments = list(segments)
        self.moments = segments[0].moments
        self.part = self.moments.part(segments[0].start, elements)

    def update(self, group: Mapping[str, Any]) -> None:
        """Do one step of AdamW."""
        for segment in self.segments:
            segment.step += 1
        with _default_stream(self.parameters[0].device):
            self._update(group)

    @abstractmethod
    def _update(self, group: Mapping[str, Any]) -> None: ...

    def _call(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        self.moments.update(weight, gradient.to(weight.dtype), self.part, self.segments[0].step, group)


class Alone(Run):
    """One parameter, updated in place."""

    def __init__(self, parameter: Tensor, segment: Segment) -> None:
        super().__init__([parameter], [segment], parameter.numel())
        self.in_place = parameter.is_contiguous()
        self.weight = parameter.detach().view(-1) if self.in_place else parameter.detach()

    def _update(self, group: Mapping[str, Any]) -> None:
        gradient = self.parameters[0].grad
        assert gradient is not None
        weight = self.weight.contiguous().view(-1)
        self._call(weight, gradient.contiguous().view(-1), group)
        if not self.in_place:
            self.weight.copy_(weight.view(self.weight.shape))


class Joined(Run):
    """Several contiguous parameters, updated as one."""

    def __init__(self, parameters: Sequence[Tensor], segments: Sequence[Segment]) -> None:
        super().__init__(parameters, segments, sum(padded(p.numel()) for p in parameters))
        filler = parameters[0].new_zeros(BLOCK)  # zeros with gradients of zero stay zeros
        pads = [filler[: padded(p.numel()) - p.numel()] for p in parameters]
        self.pads = pads if any(pad.numel() for pad in pads) else []
        self.flat = self._with_pads([p.detach().view(-1) for p in parameters])
        self.sizes = [part.numel() for part in self.flat]

    def _update(self, group: Mapping[str, Any]) -> None:
        weight = torch.cat(self.flat)
        gradients = [p.grad for p in self.parameters]
        self._call(weight, _flatten_dense_tensors(self._with_pads(gradients)), group)  # type: ignore[no-untyped-call]
        torch._foreach_copy_(self.flat, weight.split(self.sizes))  # type: ignore[no-untyped-call]

    def _with_pads(self, parts: list[Any]) -> list[Any]:
        if not self.pads:
            return parts
        return [each for part_and_pad in zip(parts, self.pads, strict=True) for each in part_and_pad]


class Plan:
    """The runs of one group, for as long as the same parameters have gradients and stay where they are."""

    def __init__(self, parameters: Sequence[Tensor], segments: Sequence[Segment]) -> None:
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise OptimizerError(
                    f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which the paged 8-bit AdamW "
                    "cannot use. Pass sparse=False to its nn.Embedding, or optimizer=None to the callback"
                )
        self.parameters = list(parameters)
        self.places = _places(parameters)
        pairs = [(p, segment) for p, segment in zip(parameters, segments, strict=True) if p.numel()]
        self.runs = list(_runs(pairs))

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the same parameters at the same places."""
        same = len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))
        return same and _places(parameters) == self.places

    def update(self, group: Mapping[str, Any]) -> None:
        """Do one step of AdamW for all of them."""
        for run in self.runs:
            run.update(group)


def in_order(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sort the parameters of a group into those whose moments share a buffer, in the order they have in it.

    Those that are updated alone come last, where they part no run.
    """

    def kind(p: Tensor) -> tuple[str, str, str]:
        return Moments.of(p).__name__, str(p.device), str(p.dtype)

    # The order of the group is kept where the sort is stable; it is the order of the model, which does not change.
    shared = [list(members) for _, members in groupby(sorted(parameters, key=kind), kind)]
    return [sorted(members, key=_is_alone) for members in shared]


def _runs(pairs: Iterable[tuple[Tensor, Segment]]) -> Iterator[Run]:
    run: list[tuple[Tensor, Segment]] = []
    for pair in sorted(pairs, key=lambda pair: (id(pair[1].moments), pair[1].start)):
        if run and not _follows(pair, run):
            yield _run(run)
            run = []
        run.append(pair)
    if run:
        yield _run(run)


def _run(pairs: Sequence[tuple[Tensor, Segment]]) -> Run:
    if len(pairs) == 1:
        return Alone(*pairs[0])
    return Joined([p for p, _ in pairs], [segment for _, segment in pairs])


def _follows(pair: tuple[Tensor, Segment], run: Sequence[tuple[Tensor, Segment]]) -> bool:
    (parameter, segment), (last, before) = pair, run[-1]
    return (
        segment.moments is before.moments
        and segment.start == before.stop
        and segment.step == before.step
        and parameter.dtype == last.dtype
        and not _is_alone(parameter)
        and not _is_alone(last)
        and segment.stop - run[0][1].start <= joining(parameter.device).limit
    )


def _is_alone(parameter: Tensor) -> bool:
    return parameter.numel() >= joining(parameter.device).alone_from or not parameter.is_contiguous()


def _places(parameters: Sequence[Tensor]) -> list[tuple[int, int, bool]]:
    return [(p.data_ptr(), p.numel(), p.is_contiguous()) for p in parameters]


@contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """Work on the stream that bitsandbytes launches its optimizers on, whatever the current one is."""
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
