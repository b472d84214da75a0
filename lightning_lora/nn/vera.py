"""VeRA: ``VeRAConfig`` says what to build, ``VeRA`` is the adapter. Random projections are drawn and shared here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lora.nn.adapter import Adapter, AdapterConfig
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of


@dataclass(frozen=True, kw_only=True, slots=True)
class VeRAConfig(AdapterConfig):
    """Vector-based random matrix adaptation (Kopiczko et al., arXiv 2310.11454): ``h = W x + b ⊙ (B (d ⊙ (A D(x))))``.

    ``A: (R, I)`` and ``B: (O, R)`` are random, never trained and never saved: they come from the seed, and all layers
    of one shape share them. A layer trains the vectors ``d`` and ``b``, ``R + O`` numbers.

    Args:
        r: Rank ``R``, at least 1. It costs little, and may exceed the layer's size; the paper uses 256 and 1024.
        dropout: Probability with which ``D`` zeroes an element of the adapter's input while training.
        d_initial: What every element of ``d`` starts at (paper, section 3.1); ``b`` starts at zero.
        seed: What ``A`` and ``B`` are drawn from. With another seed, saved vectors mean another function.
        largest_in: With ``largest_out``, all layers take the first columns of ``A`` and the first rows of ``B`` from
            one pair of this size, drawn as PEFT draws it. None gives each size of layer projections of its own.
        largest_out: See ``largest_in``.

    Raises:
        TypeError: If a number is not one.
        ValueError: If a value is out of range; the message says which are not.
    """

    method: ClassVar[str] = "vera"
    decisive: ClassVar[tuple[str, ...]] = ("r", "seed", "largest_in", "largest_out")

    r: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    seed: int = 0
    largest_in: int | None = None
    largest_out: int | None = None

    def __post_init__(self) -> None:
        kinds = {"r": (Integral, int), "dropout": (Real, float), "d_initial": (Real, float), "seed": (Integral, int)}
        if (self.largest_in is None) != (self.largest_out is None):
            raise ValueError("largest_in and largest_out are the size of one pair of projections; give both or neither")
        kinds |= {} if self.largest_in is None else dict.fromkeys(("largest_in", "largest_out"), (Integral, int))
        for name, (kind, plain) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                word = "an integer" if plain is int else "a number"
                raise TypeError(f"{name} must be {word}, got {value!r} ({type(value).__name__})")
            object.__setattr__(self, name, plain(value))
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}. Typical ranks: 256, 1024")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not (math.isfinite(self.d_initial) and self.d_initial != 0):
            raise ValueError(f"d_initial must be finite and not 0 (no gradient would reach b), got {self.d_initial}")

    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` unless it is a linear layer."""
        if kind.name != "linear":
            raise ValueError(f"VeRA adapts linear layers, and this is a layer of kind {kind.name!r}; use lora or dora")
        most = (self.largest_in or kind.in_features, self.largest_out or kind.out_features)
        if kind.in_features > most[0] or kind.out_features > most[1]:
            raise ValueError(
                f"a layer {kind.in_features} -> {kind.out_features} is larger than the projections "
                f"{most[0]} -> {most[1]} it would take its own from"
            )

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> VeRA:
        """Make a fresh :class:`VeRA` for ``base_layer``."""
        return VeRA(self, kind_of(base_layer), device=device, dtype=dtype)


class VeRA(Adapter):
    """One VeRA on one linear layer: ``y' = y + b ⊙ (B (d ⊙ (A D(x))))``.

    Attributes:
        vera_lambda_d: ``d`` of shape ``(R,)``.
        vera_lambda_b: ``b`` of shape ``(O,)``, zero at the start.
        vera_A: ``A`` of shape ``(R, I)``, one tensor for all layers of this size, on one device and of one dtype.
        vera_B: ``B`` of shape ``(O, R)``, likewise.
    """

    config: VeRAConfig
    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeRAConfig, kind: Kind, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.vera_lambda_d = nn.Parameter(torch.empty(config.r, device=device, dtype=dtype))
        self.vera_lambda_b = nn.Parameter(torch.empty(kind.out_features, device=device, dtype=dtype))
        self._share_projections()
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Map input and base output to the adapted output."""
        if self.training and self.config.dropout > 0:
            x = self.kind.drop(x, self.config.dropout)
        down = self.vera_lambda_d.to(y.dtype) * F.linear(x.to(y.dtype), self.vera_A.to(y.dtype))
        return torch.addcmul(y, self.vera_lambda_b.to(y.dtype), F.linear(down, self.vera_B.to(y.dtype)))

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``W + (b ⊙ B) (d ⊙ A)`` in ``weight``'s dtype."""
        A, B, d, b = (t.to(weight.dtype) for t in (self.vera_A, self.vera_B, self.vera_lambda_d, self.vera_lambda_b))
        return weight + self.kind.from_matrix((b.unsqueeze(1) * B) @ (d.unsqueeze(1) * A))

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``d ⊙ A`` and ``b ⊙ B``."""
        return self.vera_lambda_d.unsqueeze(1) * self.vera_A, self.vera_lambda_b.unsqueeze(1) * self.vera_B

    def spectral_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``d ⊙ L`` with ``A = L Q``, which is decomposed once for all layers that share it, and ``b ⊙ B``."""
        return self.vera_lambda_d.unsqueeze(1) * triangle(self.vera_A), self.vera_lambda_b.unsqueeze(1) * self.vera_B

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set ``d`` to its constant and zero ``b``."""
        nn.init.constant_(self.vera_lambda_d, self.config.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        return f"r={self.config.r}, dropout={self.config.dropout:g}, seed={self.config.seed}"

    def _share_projections(self) -> None:
        like = self.vera_lambda_d
        for name, factor, size in (("vera_A", "A", self.kind.in_features), ("vera_B", "B", self.kind.out_features)):
            self.register_buffer(name, projection(self.config, factor, size, like.device, like.dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VeRA:
        # Moving or casting a module moves each of its tensors by itself, and every layer would end up with its own.
        super()._apply(fn, recurse)
        self._share_projections()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_buffers": {}}  # copies and pickles draw or share them anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share_projections()


_projections: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


def projection(config: VeRAConfig, factor: str, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the random matrix that all layers of one size share: Kaiming uniform, ``U(-sqrt(6/n), sqrt(6/n))``.

    It is always drawn in ``float32`` on the CPU, so that one seed means the same everywhere.

    Args:
        config: Its rank, its seed, and the size of the pair it is a part of, if of any.
        factor: ``"A"`` of shape ``(R, I)`` or ``"B"`` of shape ``(O, R)``, which are independent of each other.
        size: ``I`` or ``O``; ``n`` is the number of columns that are drawn.
        device: Where it is wanted.
        dtype: What it is wanted in.
    """
    key = (config.seed, config.r, config.largest_in, config.largest_out, factor, size, device, dtype)
    found = _projections.get(key)
    if found is None:
        with torch.inference_mode(False):  # shared with layers that are trained
            _projections[key] = found = _draw(config, factor, size, device).to(device, dtype)
    return found


_triangles = WeakTensorKeyDictionary()


@torch.no_grad()
def triangle(projection: Tensor) -> Tensor:
    """Return ``L`` of ``A = L Q`` with orthonormal rows of ``Q``: as good as ``A`` where only ``A A^T`` counts.

    Args:
        projection: ``A`` of shape ``(R, I)``, decomposed the first time it is seen.

    Returns:
        ``L`` of shape ``(R, min(R, I))``, like ``A`` on its device and in its dtype.
    """
    found: Tensor | None = _triangles.get(projection)  # type: ignore[no-untyped-call]
    if found is None:
        upper = torch.linalg.qr(projection.cpu().double().T, mode="r").R
        _triangles[projection] = found = upper.T.contiguous().to(projection)
    return found


def _draw(config: VeRAConfig, factor: str, size: int, device: torch.device) -> Tensor:
    shape = (config.r, size) if factor == "A" else (size, config.r)
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if config.largest_in is not None and config.largest_out is not None:
        pair = _draw_pair(config.seed, config.r, config.largest_in, config.largest_out)
        return pair[factor][: shape[0], : shape[1]].contiguous()
    digest = hashlib.sha256(f"{config.seed} {factor} {shape[0]}x{shape[1]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * math.sqrt(6 / shape[1])


def _draw_pair(seed: int, r: int, columns: int, rows: int) -> dict[str, Tensor]:
    """Both projections as PEFT draws them, bit for bit: one after the other, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for factor, shape in (("A", (r, columns)), ("B", (rows, r))):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn[factor] = torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
    return drawn
