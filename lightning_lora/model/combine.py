"""A new adapter from weighted others: task arithmetic on updates.

What is combined is what each adapter adds to a weight, ``D_i = s_i B_i A_i``, never its factors by themselves: factors
that are added give cross terms ``B_i A_j``, which no adapter was trained for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterError
from lightning_lora.model.biases import train_bias_of, trained_biases
from lightning_lora.model.inject import check_name
from lightning_lora.model.layers import adapter_names, require_adapters
from lightning_lora.model.merge import is_finite
from lightning_lora.model.parameters import mark_trained, trained_modules
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Adapter
from lightning_lora.nn.base import weight_device, weight_dtype
from lightning_lora.nn.combining import Factors, drop, elect, factorize, nearest, stack, trim, weighted_sum
from lightning_lora.nn.expert_lora import ExpertLoRA
from lightning_lora.nn.lora import LoRA, LoRAConfig

LowRank = LoRA | ExpertLoRA

USES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cat": (),
    "svd": ("r",),
    "ties": ("r", "density"),
    "dare_linear": ("r", "density", "generator"),
    "dare_ties": ("r", "density", "generator"),
}
"""The ways to combine, and which further arguments each takes."""


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    r: int | None = None,
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Add an adapter made of others to ``model``, in place, and return the model; the others stay as they are.

    With ``D_i = s_i B_i A_i``, on each layer:

    - ``"cat"``: ``sum w_i D_i``, exactly; the rank is the sum of the ranks (at most the full rank of the layer).
    - ``"linear"``: ``sum w_i D_i`` in the rank of its parts, which have to agree: exactly if the sum has that rank (one
      adapter per layer, a common ``A`` or ``B``), else the nearest there is.
    - ``"svd"``: the matrix nearest to ``sum w_i D_i`` that has rank ``r``.
    - ``"ties"``: of each ``D_i`` the share ``density`` of largest elements; per element the sign of their sum is
      elected, and those that have it are weighted and averaged (arXiv 2306.01708). Then as ``"svd"``.
    - ``"dare_linear"``: each element of ``D_i`` is kept with probability ``density`` and divided by it (arXiv
      2311.03099); then weighted, summed, and as ``"svd"``.
    - ``"dare_ties"``: dropped as in DARE, elected and averaged as in TIES; then as ``"svd"``.

    PEFT's ``linear``, ``ties`` and ``dare_*`` work on ``A`` and ``B`` separately, weighted by ``sqrt(|w s|)``, which is
    another function than the sum; its ``cat``, ``svd`` and ``*_svd`` compute what ours of the same name do. TIES and
    DARE take the singular values of one ``(O, I)`` matrix per layer, the others only of ``(R, R)`` ones.

    A layer that an adapter is not on counts as a zero update. The new adapter is frozen and computes nothing until
    ``activate(model, name)``. Modules that were trained along with one of the adapters are in the model once; they are
    noted as the new one's too.

    Args:
        model: A model with adapters.
        weights: ``w_i`` by adapter; negative ones subtract.
        name: What to call the new adapter.
        how: One of the above.
        r: Rank for ``svd``, ``ties``, ``dare_linear`` and ``dare_ties``; None is the largest of the adapters' on that
            layer. Where less suffices, less is used.
        density: For ``ties``, ``dare_linear`` and ``dare_ties``: above 0, at most 1.
        generator: What ``dare_linear`` and ``dare_ties`` draw from; None is torch's global random state.

    Raises:
        AdapterError: If an adapter is not there, is not LoRA or holds NaN, if ``name`` is taken, or if ranks differ
            where they have to agree. Nothing changes then.
        ValueError: If an argument is out of range, or stands beside a ``how`` that does not use it.
    """
    recipe = _Recipe(how=how, r=r, density=density, generator=generator)
    _check_weights(weights)
    check_name(name)
    layers = require_adapters(model, *weights)
    if name in adapter_names(model):
        raise AdapterError(f"the model already holds an adapter {name!r}. Pass another name for the new one")
    made: dict[AdaptedLayer, Adapter] = {}
    for path, layer in layers.items():
        parts = {part: _lora(path, layer, part) for part in weights if part in layer.adapters}
        if parts:
            made[layer] = _build(layer, recipe.combined(path, parts, [weights[part] for part in parts]))
    along = {module for part in weights for module in trained_modules(model, part)}
    biases = {layer for part in weights for layer in trained_biases(model, part)}
    for layer, adapter in made.items():
        layer.put(name, adapter)
    for module in along:
        mark_trained(model.get_submodule(module), name)
    for path in biases:
        train_bias_of(model.get_submodule(path), name)
    return model


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How to combine, checked: the arguments of :func:`combine` of the same names."""

    how: str
    r: int | None
    density: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if self.how not in USES:
            raise ValueError(f"how must be one of {', '.join(USES)}, got {self.how!r}")
        for name in ("r", "density", "generator"):
            if getattr(self, name) is not None and name not in USES[self.how]:
                users = ", ".join(how for how, names in USES.items() if name in names)
                raise ValueError(f"how={self.how!r} takes no {name}; it is for {users}")
        if self.r is not None and (not isinstance(self.r, Integral) or isinstance(self.r, bool) or self.r < 1):
            raise ValueError(f"r must be an integer of at least 1, got {self.r!r}")
        if "density" in USES[self.how] and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(
                f"how={self.how!r} needs density, the share of elements to keep, above 0 and at most 1; got "
                f"{self.density!r}. TIES was published with 0.2, DARE with 0.1 to 0.5"
            )

    def combined(self, path: str, parts: Mapping[str, LowRank], weights: Sequence[float]) -> list[Factors]:
        """Combine the adapters on one layer: one update, or one for each of its experts."""
        ranks = {name: part.config.r for name, part in parts.items()}
        if self.how == "linear" and len(set(ranks.values())) > 1:
            found = ", ".join(f"{rank} ({name})" for name, rank in ranks.items())
            raise AdapterError(f"{path}: how='linear' keeps the rank, and these are {found}. Use how='svd' or 'cat'")
        rank = sum(ranks.values()) if self.how == "cat" else self.r or max(ranks.values())
        updates = zip(*map(self._updates, parts.values()), strict=True)
        return [self._factors(of_one_matrix, weights, rank) for of_one_matrix in updates]

    def _updates(self, adapter: LowRank) -> list[Factors]:
        """The factors of each matrix it changes, with ``s`` in ``A``."""
        device, dtype = adapter.lora_A.device, torch.promote_types(adapter.lora_A.dtype, torch.float32)
        if self.density is None:  # factors are small, and not every device computes in float64
            device, dtype = torch.device("cpu"), torch.float64
        lora_A, lora_B = adapter.config.scale * adapter.lora_A.to(device, dtype), adapter.lora_B.to(device, dtype)
        return list(zip(lora_A, lora_B, strict=True)) if isinstance(adapter, ExpertLoRA) else [(lora_A, lora_B)]

    def _factors(self, updates: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
        """Combine updates of one matrix."""
        if self.density is not None:
            return factorize(self._pruned(updates, weights, self.density), rank)
        stacked = stack(updates, weights)
        full = min(stacked[0].shape[1], stacked[1].shape[0])
        return stacked if self.how == "cat" and rank <= full else nearest(stacked, rank)

    def _pruned(self, updates: Sequence[Factors], weights: Sequence[float], density: float) -> Tensor:
        dense = [lora_B @ lora_A for lora_A, lora_B in updates]
        if self.how == "ties":
            return elect([trim(update, density) for update in dense], weights)
        dropped = [drop(update, density, self.generator) for update in dense]
        return elect(dropped, weights) if self.how == "dare_ties" else weighted_sum(dropped, weights)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"weights must map names of adapters to numbers, such as {{'a': 0.7, 'b': 0.3}}; got {weights!r}"
        )
    for name, weight in weights.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")


def _lora(path: str, layer: AdaptedLayer, name: str) -> LowRank:
    adapter = layer.adapter(name)
    if not isinstance(adapter, LoRA | ExpertLoRA):
        raise AdapterError(
            f"adapter {name!r} on {path} is {adapter.config.method}, and only LoRA updates can be weighted and added. "
            f"Leave {name!r} out, or merge it into the base first"
        )
    if not all(is_finite(tensor) for tensor in adapter.parameters()):
        raise AdapterError(f"adapter {name!r} on {path} holds NaN or infinity. Load it anew, or leave it out")
    # of one that started in the weight, what it changes
    return adapter.plain() if isinstance(adapter, LoRA) else adapter


def _build(layer: AdaptedLayer, combined: Sequence[Factors]) -> Adapter:
    rank = combined[0][0].shape[0]
    dtype = torch.promote_types(weight_dtype(layer.base_layer), torch.float32)
    config = LoRAConfig(r=rank, alpha=rank)  # s = 1: all scaling is in the factors
    # On the meta device nothing is drawn, and the global random state stays as it is.
    adapter = config.build(layer.base_layer, device=torch.device("meta"), dtype=dtype).train(layer.training)
    for key, factors in zip(("lora_A", "lora_B"), zip(*combined, strict=True), strict=True):
        factor = torch.stack(factors) if isinstance(adapter, ExpertLoRA) else factors[0]
        values = factor.to(device=weight_device(layer.base_layer), dtype=dtype).contiguous()
        setattr(adapter, key, nn.Parameter(values, requires_grad=False))
    return adapter
