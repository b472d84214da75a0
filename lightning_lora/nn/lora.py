"""LoRA: ``LoRAConfig`` says what to build, ``LoRA`` is the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError
from lightning_lora.nn import loftq
from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.base import is_called_as_it_is
from lightning_lora.nn.decompose import Pair, decomposition, without
from lightning_lora.nn.expert_lora import ExpertLoRA
from lightning_lora.nn.experts import ExpertsKind
from lightning_lora.nn.functional import delta, update_merger, updated
from lightning_lora.nn.kind import Kind
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.low_rank import SCALINGS, LowRankConfig, draw_factors
from lightning_lora.nn.pieces import PieceMerger


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig(LowRankConfig):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): ``h = W x + s B A D(x)`` with ``A: (R, I)``, ``B: (O, R)``.

    Args:
        r: Rank ``R``, at least 1 and at most ``min(I, O)`` of every layer it is put on.
        alpha: Numerator of the scaling ``s``. It acts much like a learning rate; when ``r`` changes, ``s`` changes with
            it.
        dropout: Probability with which ``D`` zeroes an element of the adapter's input while training.
        init: How it starts. By chance: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"`` (even ``r``), see
            :mod:`lightning_lora.nn.init`. In the base weight, which stays as it is: ``"pissa"`` (exact), or
            ``"pissa_niter_4"`` (randomized, with that many iterations), ``"olora"``, see
            :mod:`lightning_lora.nn.decompose`. Fitted to a base that is being quantized: ``"loftq"``, see
            :mod:`lightning_lora.nn.loftq`. In the directions of the layer's inputs: ``"eva"``, see
            :func:`lightning_lora.initialize_eva`.
        scaling: ``"standard"``: ``s = alpha / r``; ``"rslora"``: ``s = alpha / sqrt(r)`` (arXiv 2312.03732).

    Raises:
        TypeError: If a number is not one.
        ValueError: If a value is out of range; the message says which are not.
    """

    method: ClassVar[str] = "lora"

    starts: ClassVar[tuple[str, ...]] = ("chance", "weight", "quantization", "data")

    def with_rank(self, r: int, *, init: str | None = None) -> LoRAConfig:
        """Return the config with another rank and the ``alpha`` that keeps the scaling ``s``."""
        alpha = self.alpha * self.scale / SCALINGS[self.scaling](self.alpha, r)
        return replace(self, r=r, alpha=alpha, init=init or self.init)

    def check(self, kind: Kind) -> None:
        """Raise ``ValueError`` if the rank is more than such a layer can have, or it cannot drop out or start so."""
        LowRankConfig.check(self, kind)
        if self.starts_from != "chance" and kind.name == "embedding":
            raise ValueError(
                f"an embedding has a start of its own, one factor zero and the other random, and cannot have "
                f"init={self.init!r}; give it a config without, as in targets={{..., 'embed': LoRAConfig(r={self.r})}}"
            )

    def build(self, base_layer: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Adapter:
        """Make a fresh :class:`LoRA` for ``base_layer``, or one for each expert of a stack."""
        kind = kind_of(base_layer)
        if isinstance(kind, ExpertsKind):
            return ExpertLoRA(self, kind, device=device, dtype=dtype)
        return LoRA(self, kind, device=device, dtype=dtype)


class LoRA(Adapter):
    """One LoRA on one layer: ``y' = y + s B A phi(D(x))``, on a linear layer ``y + s (D(x) A^T) B^T``.

    An adapter whose start ``s B0 A0`` is a part of the weight (PiSSA, OLoRA, LoftQ) leaves the base as it is and adds
    the change alone, ``s (B A - B0 A0) phi(D(x))``: it starts at the base model bit for bit. Where the base could be
    quantized without that start, ``Q = quantized(W - s B0 A0)``, it adds the whole ``s B A`` to it.

    Attributes:
        lora_A: Down projection of shape ``(R, I)``, random at the start (over an embedding zero).
        lora_B: Up projection of shape ``(O, R)``, zero at the start (over an embedding random).
        lora_A0: Where ``lora_A`` started if that is a part of the weight, else None.
        lora_B0: The same of ``lora_B``.
        taken_A: Bits of the factor that was taken off the base weight before it was quantized, or None. Integers, so
            that no cast of the module rounds them: they are needed to quantize the same base again.
        taken_B: The same of the other factor.
    """

    up = ("lora_B",)

    config: LoRAConfig
    lora_A0: Tensor | None
    lora_B0: Tensor | None
    taken_A: Tensor | None
    taken_B: Tensor | None

    def __init__(self, config: LoRAConfig, kind: Kind, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.lora_A = nn.Parameter(torch.empty(config.r, kind.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(kind.out_features, config.r, device=device, dtype=dtype))
        in_weight = config.starts_from in ("weight", "quantization")
        self.register_buffer("lora_A0", torch.zeros_like(self.lora_A, requires_grad=False) if in_weight else None)
        self.register_buffer("lora_B0", torch.zeros_like(self.lora_B, requires_grad=False) if in_weight else None)
        self.register_buffer("taken_A", None)
        self.register_buffer("taken_B", None)
        self.started = config.starts_from == "chance"
        self._may_take_off = in_weight
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor, base_layer: nn.Module) -> Tensor:
        """Map input and base output to the adapted output."""
        self._require_start()
        if self._drops_the_change:
            y = self.put_back(y, x)
        lora_A, lora_B = self._factors(whole=self.taken_A is not None and not self._drops_the_change)
        if self._dropout > 0:
            x = self.kind.drop(x, self._dropout)
        return self.kind.add_low_rank(y, x, lora_A, lora_B, self.config.scale)

    def over(self, x: Tensor, base_layer: nn.Module) -> Tensor:
        """Map the input to the adapted output."""
        self._require_start()
        if self._drops_the_change or not is_called_as_it_is(self):
            return super().over(x, base_layer)
        lora_A, lora_B = self._factors(whole=self.taken_A is not None)
        return self.kind.over(base_layer, x, lora_A, lora_B, self.config.scale, self._dropout)

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    @property
    def _drops_the_change(self) -> bool:
        """Whether a start taken off the base has to be put back: what drops out is never a part of the base."""
        return self._dropout > 0 and self.taken_A is not None

    def merged(self, weight: Tensor) -> Tensor:
        """Return ``W + s B A``, or ``W + s (B A - B0 A0)``, in ``weight``'s dtype."""
        self._require_start()
        lora_A, lora_B = self._factors(whole=self.taken_A is not None)
        return self.kind.from_matrix(updated(self.kind.to_matrix(weight), lora_A, lora_B, self.config.scale))

    def piece_merger(self) -> PieceMerger | None:
        """Return what does so with some outputs alone, where the layer stores them first."""
        self._require_start()
        lora_A, lora_B = self._factors(whole=self.taken_A is not None)
        return update_merger(lora_A, lora_B, self.config.scale) if self.kind.stores_rows else None

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``s B``, or those of the change ``s (B A - B0 A0)`` where there is a start."""
        lora_A, lora_B = self._factors(whole=False)
        return lora_A, self.config.scale * lora_B

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw one factor and zero the other, or go back to where the factors started in the weight."""
        if self.started and self.lora_A0 is not None and self.lora_B0 is not None:
            self.lora_A.copy_(self.lora_A0)
            self.lora_B.copy_(self.lora_B0)
            return
        draw_factors(self.config, self.kind, self.lora_A, self.lora_B)

    # Starting from the base weight

    @torch.no_grad()
    def start(self, weight: Callable[[], Tensor]) -> None:
        """Decompose the weight, if that is where this adapter starts."""
        decompose = decomposition(self.config.init)
        if decompose is not None:
            matrix = self.kind.to_matrix(weight())
            _require_values(matrix, self.config.init)
            self._start_at(decompose(matrix, self.config.r, self.config.scale))

    @torch.no_grad()
    def start_with(self, lora_A: Tensor) -> None:
        """Start at this ``lora_A`` of shape ``(R, I)`` and at a zero ``lora_B``."""
        self.lora_A.copy_(lora_A)
        self.lora_B.zero_()
        self.started = True

    @torch.no_grad()
    def take_off(self, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Take the start off, unless the quantized weight alone would be nearer than with it.

        ``||W - deq(Q) - s B A||`` at the start is therefore never above the error of plain quantization.
        """
        matrix = self.kind.to_matrix(weight)
        taken = self._taken() or self._choose_taken(matrix, rounded)
        if taken is None:
            return None
        self.taken_A, self.taken_B = (_bits(factor).to(self.lora_A.device) for factor in taken)
        return self.kind.from_matrix(without(matrix, taken, self.config.scale))

    def put_back(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + s B0 A0 phi(x)``."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return y
        return self.kind.add_low_rank(y, x, self.lora_A0, self.lora_B0, self.config.scale)

    def restored(self, weight: Tensor) -> Tensor:
        """Return ``W + s B0 A0``."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return weight
        return weight + self.kind.from_matrix(delta(self.lora_A0, self.lora_B0, self.config.scale, weight.dtype))

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Take up factors and start, and whether and what to take off the base."""
        if self.lora_A0 is None or "lora_A0" not in state:
            return
        self.load_state_dict({key: state[key] for key in ("lora_A", "lora_B", "lora_A0", "lora_B0")})
        self._may_take_off = "taken_A" in state
        if self._may_take_off:
            self.taken_A, self.taken_B = (state[key].to(self.lora_A.device) for key in ("taken_A", "taken_B"))

    def stands_on_same_base(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the same factors, to the bit, were taken off the base there."""
        here = {"taken_A": self.taken_A, "taken_B": self.taken_B}
        return all(
            mine is None or key not in state or torch.equal(mine.cpu(), state[key].cpu()) for key, mine in here.items()
        )

    @torch.no_grad()
    def plain(self) -> LoRA:
        """Return a LoRA that adds the same change to the original base and needs no ``lora_A0``: of rank ``2 R``.

        ``B A - B0 A0 = [B, B - B0] [A - A0; A0]``. Where ``2 R`` is more than the full rank of the layer, the product
        itself is one of the factors.
        """
        self._require_start()
        if self.lora_A0 is None:
            return self
        lora_A, lora_B = self._factors(whole=False)
        full = min(self.kind.in_features, self.kind.out_features)
        if lora_A.shape[0] > full:
            product, identity = lora_B @ lora_A, torch.eye(full, dtype=lora_A.dtype, device=lora_A.device)
            lora_A, lora_B = (product, identity) if full == self.kind.out_features else (identity, product)
        plain = LoRA(
            self.config.with_rank(lora_A.shape[0], init="kaiming"),
            self.kind,
            device=lora_A.device,
            dtype=lora_A.dtype,
        )
        plain.lora_A.copy_(lora_A)
        plain.lora_B.copy_(lora_B)
        return plain.train(self.training)

    def _factors(self, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Factors of the update ``B A``, or of the change ``B A - B0 A0`` where there is a start.

        The change is written with differences, ``B (A - A0) + (B - B0) A0``: exactly zero at the start, and small
        updates are not lost when large factors are rounded to half precision.
        """
        if self.lora_A0 is None or self.lora_B0 is None or whole:
            return self.lora_A, self.lora_B
        lora_A0, lora_B0 = self.lora_A0.to(self.lora_A.dtype), self.lora_B0.to(self.lora_B.dtype)
        down, up = (self.lora_A - lora_A0, lora_A0), (self.lora_B, self.lora_B - lora_B0)
        return torch.cat(down), torch.cat(up, dim=1)

    def _choose_taken(self, matrix: Tensor, rounded: Callable[[Tensor], Tensor]) -> Pair | None:
        scale = self.config.scale
        if not self.started and self.config.starts_from == "quantization":
            found = loftq.fit(
                matrix.to(torch.promote_types(matrix.dtype, torch.float32)), rounded, self.config.r, scale
            )
            self._start_at(found.start)
            return found.taken
        if self.lora_A0 is None or self.lora_B0 is None or not (self.started and self._may_take_off):
            return None
        rest = without(matrix, (self.lora_A0, self.lora_B0), scale)
        helps = loftq.norm(rest - rounded(rest)) <= loftq.norm(matrix - rounded(matrix))
        return (self.lora_A0, self.lora_B0) if helps else None

    def _start_at(self, pair: Pair) -> None:
        assert self.lora_A0 is not None
        assert self.lora_B0 is not None
        self.lora_A0.copy_(pair[0])
        self.lora_B0.copy_(pair[1])
        self.started = True
        self.reset_parameters()

    def _taken(self) -> Pair | None:
        if self.taken_A is None or self.taken_B is None:
            return None
        return _floats(self.taken_A), _floats(self.taken_B)

    def _require_start(self) -> None:
        if not self.started:
            raise AdapterError(f"init={self.config.init!r} {_BEFORE_USE[self.config.starts_from]}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.started = self.started or f"{prefix}lora_A" in state_dict  # a trained adapter has had its start

    def extra_repr(self) -> str:
        """The hyperparameters, for ``print(model)``."""
        start = "" if self.config.starts_from == "chance" else f", init={self.config.init}"
        return f"{self.config}{start}"


_BEFORE_USE = {
    "weight": "starts from the base weight, which this adapter has not seen: make it with inject(model, ...)",
    "quantization": "starts where the base is quantized: call quantize(model) while this adapter is active, first",
    "data": "starts from data: call initialize_eva(model, batches) first",
}


def _require_values(matrix: Tensor, init: str) -> None:
    if matrix.is_meta:
        raise ValueError(
            f"init={init!r} starts from the base weight, which is on the meta device and holds no values yet. Load the "
            "weights before the adapters are put in, or use init='kaiming'"
        )
    if matrix.numel() and not torch.stack(torch.aminmax(matrix)).isfinite().all():
        raise ValueError(f"init={init!r} starts from the base weight, which holds NaN or infinity. Mend the base model")


def _bits(factor: Tensor) -> Tensor:
    bits = torch.int64 if factor.dtype == torch.float64 else torch.int32
    # Cloned: torch.save refuses two tensors that share memory as different types.
    return factor.clone(memory_format=torch.contiguous_format).view(bits)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float64 if bits.dtype == torch.int64 else torch.float32)
