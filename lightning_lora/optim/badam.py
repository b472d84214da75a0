"""BAdam: AdamW on one block of the model at a time (Luo et al., arXiv 2404.02827).

The authors' package saves neither which block is trained nor how far it is, and empties the cache of the GPU at each
step. Here a saved state goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError
from lightning_lora.model.blocks import repeated_blocks
from lightning_lora.optim.adamw import fresh_moments, update
from lightning_lora.optim.closures import evaluated
from lightning_lora.optim.takeover import groups_of, with_hooks_of

ORDERS = ("random", "ascending", "descending")


@dataclass(frozen=True, kw_only=True)
class BAdam:
    """Which block is trained when: ``LoRACallback(method="full", optimizer=BAdam(switch_every=50))``.

    Args:
        switch_every: ``K``: for how many steps each block is trained.
        order: Of the blocks in a pass over the model: ``"random"`` (another one in each pass, the same in each run),
            ``"ascending"`` from the inputs on, or ``"descending"``.

    Raises:
        ValueError: If a value is out of range.
    """

    name: ClassVar[str] = "badam"

    switch_every: int = 100
    order: str = "random"

    def __post_init__(self) -> None:
        k = self.switch_every
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"switch_every of BAdam must be a whole number of at least 1, got {k!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order of BAdam must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def block_at(self, step: int, count: int) -> int:
        """Return which of ``count`` blocks is trained in a step, counted from 0."""
        turn, place = divmod(step // self.switch_every, count)
        if self.order == "random":
            draw = torch.Generator().manual_seed(turn)
            return int(torch.randperm(count, generator=draw)[place])
        return place if self.order == "ascending" else count - 1 - place

    def build(self, optimizer: Optimizer, model: nn.Module, names: Mapping[Tensor, str]) -> BlockAdamW:
        """Return it over the parameter groups of ``optimizer``; see :class:`lightning_lora.optim.swaps.Swap`."""
        blocks = list(blocks_of(model).values())
        return with_hooks_of(optimizer, BlockAdamW(groups_of(optimizer, "BAdam"), blocks, self))


def blocks_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the blocks that are trained one at a time, by name: those the model repeats, and what lies around them.

    What comes before the first repeated block (embeddings) is a block, and so is what comes after it outside of the
    others (the last norm, the head). A model that repeats none is one block. Parameters that require no gradient are
    left out.
    """
    repeated = repeated_blocks(model)
    found: dict[str, list[nn.Parameter]] = {"before": [], **{name: [] for name in repeated}, "after": []}
    around = "before"
    for name, parameter in model.named_parameters():
        inside = next((block for block in repeated if name.startswith(f"{block}.")), None)
        around = "after" if inside else around
        if parameter.requires_grad:
            found[inside or around].append(parameter)
    return {name: block for name, block in found.items() if block}


class BlockAdamW(Optimizer):
    r"""AdamW over one block of parameters, and every :math:`K` steps over another (arXiv 2404.02827, algorithm 1).

    Parameters outside of the block require no gradient, so none is computed for them. A block starts with moments of
    zero and its own count of steps. Moments are in ``float32``, and so is a copy of the weights that are trained where
    these are in half precision; it is rounded into them after each step. With a single block this is
    ``torch.optim.AdamW``, bit for bit.

    Args:
        params: Parameters or groups of them, with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        blocks: The parameters of each block, in the order of the model.
        config: Which block is trained when.

    Attributes:
        steps: How many have been done.
    """

    def __init__(self, params: Iterable[Any], blocks: Sequence[Sequence[nn.Parameter]], config: BAdam) -> None:
        self.config = config
        self.steps = 0
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        super().__init__(params, defaults)
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        mine = [[parameter for parameter in block if parameter in held] for block in blocks]
        self.blocks = [block for block in mine if block]
        self._turn_to(self.block)

    @property
    def block(self) -> int:
        """Which block the next step trains."""
        return self.config.block_at(self.steps, len(self.blocks))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters of the block that have a gradient, and turn to the next block when it is time.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        before, self.steps = self.block, self.steps + 1
        if self.block != before:
            self._turn_to(self.block)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what every optimizer of torch does, and how far this one is."""
        saved = super().state_dict()
        return {**saved, "badam": {**_words(self.config), "blocks": len(self.blocks), "steps": self.steps}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state, in ``float32`` as it was saved.

        Raises:
            OptimizerError: If it was saved with other blocks or another order of them.
        """
        saved = dict(state_dict.get("badam", {}))
        steps, here = saved.pop("steps", 0), {**_words(self.config), "blocks": len(self.blocks)}
        if saved != here:
            raise OptimizerError(
                f"the saved optimizer is BAdam with {saved}, this one has {here}. Set optimizer=BAdam(...) to the same "
                "values"
            )
        super().load_state_dict({**state_dict, "state": {}})  # torch would round states to the weights' dtype
        self.steps = steps
        self._turn_to(self.block)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for position, entry in state_dict["state"].items():
            place = parameters[position].device
            self.state[parameters[position]] = {
                name: tensor.clone() if name == "step" else tensor.to(place, copy=True)
                for name, tensor in entry.items()
            }

    def _turn_to(self, index: int) -> None:
        for at, block in enumerate(self.blocks):
            for parameter in block:
                parameter.requires_grad_(at == index)
                if at != index:
                    parameter.grad = None
                    self.state.pop(parameter, None)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state = self.state[parameter]
        if not state:
            if parameter.dtype != wide:
                state["weight"] = parameter.to(wide)
            state.update(fresh_moments(state.get("weight", parameter)))
        weight = state.get("weight", parameter)
        update(weight, gradient.to(wide), state, group)
        if weight is not parameter:
            parameter.copy_(weight)


def _words(config: BAdam) -> dict[str, Any]:
    """The values that a saved state goes with."""
    return {"switch_every": config.switch_every, "order": config.order}
