"""Paged 8-bit AdamW with one update for many parameters, by bitsandbytes' own kernels.

``bitsandbytes.optim.PagedAdamW8bit`` launches a kernel and waits for the GPU once for each parameter, pages none of
less than 100,000 elements and saves its state by position. Adapters are hundreds of small parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_lora.errors import OptimizerError, listing
from lightning_lora.optim.closures import evaluated
from lightning_lora.optim.moments import Moments, library, padded
from lightning_lora.optim.runs import Plan, Segment, in_order

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides 8-bit states in a state dict from FSDP1."""

_NOT_OURS = ("params", "param_names", "alpha", "t_alpha", "t_beta3")
"""What is not taken over from a saved group: the parameters, and what bitsandbytes has for another optimizer."""


class FlatPagedAdamW8bit(Optimizer):
    r"""AdamW with 8-bit moments, kept behind one another in one paged buffer for each group, device and dtype.

    For a parameter :math:`w` with gradient :math:`g`, at its step :math:`t` (Loshchilov and Hutter, arXiv 1711.05101,
    algorithm 2; moments in blocks of 256 elements as in Dettmers et al., arXiv 2110.02861, section 2):

    .. math::

        m = \beta_1 m + (1 - \beta_1) g, \quad v = \beta_2 v + (1 - \beta_2) g^2, \quad
        w = (1 - \eta\lambda) w - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    A step is one update per group as long as its parameters take part in the same steps; one whose gradient is None is
    passed over. The numbers are those of ``bitsandbytes.optim.PagedAdamW8bit``, bit for bit. As there, parameters of
    less than 4096 elements have moments in 32 bits; those of a group take a buffer and an update of their own.

    Args:
        params: Parameters or groups of them, as for every optimizer of torch.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        names: Names of the parameters, under which their moments are saved. Without a name, from here or from
            ``named_parameters()``, a parameter is saved under its position.

    Raises:
        OptimizerError: If a parameter is sharded, complex or of integers.
        UnsupportedError: If bitsandbytes is not installed.
    """

    also_reads: ClassVar[tuple[str, ...]] = ("bitsandbytes.optim.PagedAdamW8bit",)
    """Optimizers whose saved state it takes up."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        names: Mapping[Tensor, str] | None = None,
    ) -> None:
        library()
        self._names = dict(names or {})
        self._plans: dict[int, Plan] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.defaults["foreach"] = True  # zero_grad(set_to_none=False) in one launch

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for every optimizer of torch."""
        super().add_param_group(param_group)
        for parameter in param_group["params"]:
            if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
                self.param_groups.pop()
                raise OptimizerError(
                    f"the paged 8-bit AdamW updates plain floating point tensors, and a parameter of shape "
                    f"{tuple(parameter.shape)} is a {type(parameter).__name__} of {parameter.dtype}. Keep your "
                    "optimizer for it: optimizer=None"
                )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along."""
        return {**super().__getstate__(), "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be what was copied or pickled."""
        super().__setstate__(state)
        self._plans = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned.
        """
        loss = evaluated(closure)
        waiting = set()
        for index, group in enumerate(self.param_groups):
            plan = self._plan(index, group["params"])
            plan.update(group)
            waiting |= {run.moments.device for run in plan.runs if run.moments.paged}
        for device in waiting:  # the host may read paged moments at any time, to save them for instance
            torch.cuda.synchronize(device)
        return loss

    def moments(self) -> list[Moments]:
        """The buffers there are; none before the first step."""
        found = {id(segment.moments): segment.moments for segment in self.state.values()}
        return list(found.values())

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return moments and steps under the name of each parameter, and the groups with the names they hold.

        Tensors are views of the buffers, as other optimizers return their own.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        keys = self._keys()
        state = {
            key: {"step": self.state[p].step, **self.state[p].tensors(p.shape)}
            for key, p in zip(_chained(keys), self._parameters(), strict=True)
            if p in self.state and self.state[p].step
        }
        saved: dict[str, Any] = {
            "state": state,
            "param_groups": [
                {name: value for name, value in group.items() if name not in ("params", "param_names")}
                | {"params": members}
                for group, members in zip(self.param_groups, keys, strict=True)
            ],
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state: by names, or one of ``bitsandbytes.optim.PagedAdamW8bit`` by position.

        Raises:
            OptimizerError: If it is the state of other parameters.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        matched = self._match(state_dict["param_groups"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(copy.deepcopy({name: value for name, value in saved.items() if name not in _NOT_OURS}))
            self._settle(group["params"])
        self._forget()
        for key, entry in state_dict["state"].items():
            self._fill(key, matched[key], {**entry, **entry.get(_WRAPPED, {})})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _keys(self) -> list[list[str | int]]:
        """The names of each group's parameters, or their positions where they have none."""
        position = -1
        keys: list[list[str | int]] = []
        for group in self.param_groups:
            keys.append([])
            for index, parameter in enumerate(group["params"]):
                position += 1
                own = group["param_names"][index] if "param_names" in group else position
                keys[-1].append(self._names.get(parameter, own))
        return keys

    def _plan(self, index: int, parameters: Sequence[Tensor]) -> Plan:
        trained = [p for p in parameters if p.grad is not None]
        plan = self._plans.get(index)
        if plan is None or not plan.holds(trained):
            self._settle(parameters)
            plan = self._plans[index] = Plan(trained, [self.state[p] for p in trained])
        return plan

    def _settle(self, parameters: Sequence[Tensor]) -> None:
        """Give a place to the moments of parameters that have none where they are now."""
        strangers = [p for p in parameters if p not in self.state or self.state[p].moments.device != p.device]
        for members in in_order(strangers):
            moments = Moments.of(members[0])(sum(padded(p.numel()) for p in members), members[0].device)
            start = 0
            for parameter in members:
                segment = Segment(moments, start, parameter.numel())
                start = segment.stop
                if parameter in self.state:
                    before = self.state[parameter]
                    moments.fill(segment.start, parameter.shape, before.tensors(parameter.shape))
                    segment.step = before.step
                self.state[parameter] = segment

    def _forget(self) -> None:
        self._plans.clear()
        for moments in self.moments():
            moments.zero_()
        for segment in self.state.values():
            segment.step = 0

    def _match(self, saved: Sequence[Mapping[str, Any]]) -> dict[str | int, Tensor]:
        """Find the parameter of each saved key."""
        if len(saved) != len(self.param_groups):
            raise OptimizerError(f"the saved optimizer has {len(saved)} groups, this one {len(self.param_groups)}")
        matched: dict[str | int, Tensor] = {}
        for index, (theirs, ours, group) in enumerate(zip(saved, self._keys(), self.param_groups, strict=True)):
            there, here = theirs["params"], ours
            if all(isinstance(key, int) for key in there) and len(there) == len(here):
                here = there  # by position, as bitsandbytes and torch save
            if set(there) != set(here):
                lacks, has = [k for k in here if k not in set(there)], [k for k in there if k not in set(here)]
                raise OptimizerError(
                    f"group {index} of the saved optimizer holds {listing(map(str, has)) or 'nothing'} beyond this "
                    f"one's parameters and lacks {listing(map(str, lacks)) or 'nothing'}"
                )
            matched |= dict(zip(here, group["params"], strict=True))
        return matched

    def _fill(self, key: str | int, parameter: Tensor, entry: Mapping[str, Any]) -> None:
        segment = self.state[parameter]
        try:
            segment.moments.fill(segment.start, parameter.shape, entry)
            segment.step = int(entry["step"])
        except (KeyError, OptimizerError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise OptimizerError(f"the saved moments of {key} do not fit: {reason}") from None


def _chained(keys: Iterable[Iterable[str | int]]) -> list[str | int]:
    return [key for members in keys for key in members]
