"""GaLore: AdamW in the space that the leading directions of each gradient span (Zhao et al., arXiv 2403.03507).

The authors' package keeps its projections as Python objects in the state and needs their copy of a removed class of
transformers, so no checkpoint of it loads safely or resumes exactly. Here all state is tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError
from lightning_lora.optim.adamw import fresh_moments, update
from lightning_lora.optim.closures import evaluated
from lightning_lora.optim.takeover import groups_of, with_hooks_of


@dataclass(frozen=True, kw_only=True)
class GaLore:
    """How gradients are projected: ``LoRACallback(method="full", optimizer=GaLore(rank=64))``.

    Args:
        rank: ``R``, of the projected gradients. Matrices with no side above it are trained by plain AdamW.
        update_proj_gap: ``T``: after how many steps the directions are taken from the gradient anew.
        scale: What an update of a projected matrix is multiplied with (``alpha`` in the paper).

    Raises:
        ValueError: If a value is out of range.
    """

    name: ClassVar[str] = "galore_adamw"

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        for name in ("rank", "update_proj_gap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of GaLore must be a whole number of at least 1, got {value!r}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale of GaLore must be above 0, got {self.scale!r}")

    def projects(self, parameter: Tensor) -> bool:
        """Whether a parameter has its moments in the projected space: a matrix with both sides above the rank."""
        return parameter.dim() == 2 and min(parameter.shape) > self.rank

    def build(self, optimizer: Optimizer, model: nn.Module, names: Mapping[Tensor, str]) -> GaLoreAdamW:
        """Return it over the parameter groups of ``optimizer``; see :class:`lightning_lora.optim.swaps.Swap`."""
        return with_hooks_of(optimizer, GaLoreAdamW(groups_of(optimizer, "GaLore's AdamW"), self))


class GaLoreAdamW(Optimizer):
    r"""AdamW over projected gradients (arXiv 2403.03507, algorithm 2).

    For a matrix :math:`W` of shape ``(M, N)`` with :math:`M \le N` and gradient :math:`G` (a tall one is seen
    transposed), every :math:`T` steps :math:`P` becomes the :math:`R` leading left singular vectors of :math:`G`, and
    with AdamW's step :math:`-\eta N_t` for the gradient :math:`P^T G`, in moments of shape ``(R, N)``:

    .. math::

        W = (1 - \eta\lambda) W - \eta\, \alpha P N_t

    Moments stay as they are when :math:`P` changes. They are of the parameter's dtype, as in ``torch.optim.AdamW``,
    which is what parameters get that :meth:`GaLore.projects` leaves out.

    Args:
        params: Parameters or groups of them, with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        config: How gradients are projected.
    """

    def __init__(self, params: Iterable[Any], config: GaLore) -> None:
        self.config = config
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        super().__init__(params, {**defaults, "galore": _words(config)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            OptimizerError: If it was saved with other projections.
        """
        for group in state_dict["param_groups"]:
            if group.get("galore") != _words(self.config):
                raise OptimizerError(
                    f"the saved optimizer is GaLore with {group.get('galore')}, this one has {_words(self.config)}. "
                    "Set optimizer=GaLore(...) to the same values"
                )
        super().load_state_dict(state_dict)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not self.config.projects(parameter):
            if not state:
                state.update(fresh_moments(parameter))
            update(parameter, gradient, state, group)
            return
        is_tall = parameter.shape[0] > parameter.shape[1]
        weight, wide = (parameter.T, gradient.T) if is_tall else (parameter, gradient)
        if not state or int(state["step"]) % self.config.update_proj_gap == 0:
            state["projector"] = leading_directions(wide, self.config.rank)
        projected = state["projector"].T @ wide
        if "step" not in state:
            state.update(fresh_moments(projected))
        change = torch.zeros_like(projected)
        update(change, projected, state, {**group, "weight_decay": 0.0})
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addmm_(state["projector"], change, alpha=self.config.scale)


def leading_directions(gradient: Tensor, rank: int) -> Tensor:
    """Return the ``R`` leading left singular vectors of a matrix, of shape ``(M, R)`` and in its dtype.

    They are eigenvectors of ``G G^T``, which is ``(M, M)`` however long the other side is: a fraction of the time and
    memory of a decomposition of ``G``. Only directions that matter little to ``G`` lose digits by the square.

    Args:
        gradient: ``G`` of shape ``(M, N)``, ``M <= N``.
        rank: ``R``.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    wide = wide / wide.abs().amax().clamp_min(torch.finfo(wide.dtype).tiny)  # squares of small gradients would vanish
    directions: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]  # in ascending order
    return directions.to(gradient.dtype, copy=True, memory_format=torch.contiguous_format)


def _words(config: GaLore) -> dict[str, Any]:
    """The values that a saved state goes with."""
    return {"rank": config.rank, "update_proj_gap": config.update_proj_gap, "scale": float(config.scale)}
