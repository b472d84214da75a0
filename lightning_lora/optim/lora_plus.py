"""LoRA+ (Hayou et al., arXiv 2402.12354): ``B`` learns faster than ``A``, by a ratio of about 16.

Either as parameter groups for an optimizer of one's own, or by splitting the groups of an optimizer that exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.errors import OptimizerError, listing
from lightning_lora.model.layers import require_adapters
from lightning_lora.model.parameters import adapter_parameters, up_parameters

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Where torch's optimizers and schedulers keep a group's learning rates in the group itself."""

_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
"""Where torch's schedulers keep a learning rate for each group."""

_SCHEDULER_LISTS = (*_SCHEDULER_RATES, "lr_lambdas", "base_momentums", "max_momentums")
"""Where torch's schedulers keep something for each group."""


def param_groups(
    model: nn.Module, *, lr: float, lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer over all that is trained in ``model``.

    Args:
        model: A model with adapters.
        lr: Learning rate of everything but the factors ``B``.
        lr_ratio: What the learning rate of ``B`` is a multiple by; LoRA+ recommends 16, and a somewhat lower ``lr``.
        weight_decay: For matrices. Vectors (DoRA's magnitudes, biases, norms) are not drawn towards zero.

    Returns:
        Up to four groups, named ``"A"``, ``"B"``, ``"others"`` (matrices of modules trained whole) and ``"vectors"``.

    Raises:
        AdapterError: If the model has no adapters.
        OptimizerError: If none of them has a factor ``B``, and ``lr_ratio`` is not 1.
        ValueError: If ``lr`` or ``lr_ratio`` is not finite and above 0.

    Example:
        >>> from lightning_lora import LoRAConfig, inject, param_groups
        >>> model = inject(nn.Sequential(nn.Linear(8, 8)), config=LoRAConfig(r=2))
        >>> [(group["name"], group["lr"]) for group in param_groups(model, lr=0.5, lr_ratio=16)]
        [('A', 0.5), ('B', 8.0)]
    """
    check_rate("lr", lr)
    check_rate("lr_ratio", lr_ratio)
    adapters, up = {id(p) for p in adapter_parameters(model)}, {id(p) for p in factors_up(model, lr_ratio)}
    groups: dict[str, list[Tensor]] = {"A": [], "B": [], "others": [], "vectors": []}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if id(parameter) in up:
            name = "B"
        elif parameter.ndim < 2:
            name = "vectors"
        else:
            name = "A" if id(parameter) in adapters else "others"
        groups[name].append(parameter)
    return [
        {
            "params": parameters,
            "name": name,
            "lr": lr * lr_ratio if name == "B" else lr,
            "weight_decay": 0.0 if name == "vectors" else weight_decay,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def factors_up(model: nn.Module, lr_ratio: float) -> list[nn.Parameter]:
    """Return the factors ``B``, of which there have to be some where they are to learn at a rate of their own.

    Raises:
        OptimizerError: If ``lr_ratio`` would change nothing.
    """
    found = list(up_parameters(model))
    if lr_ratio != 1 and not found:
        layers = require_adapters(model).values()
        methods = sorted({layer.adapter(name).config.method for layer in layers for name in layer.adapters})
        raise OptimizerError(
            f"lr_ratio={lr_ratio:g} is for factors B (LoRA+), and adapters of {listing(methods)} have none, so it "
            "would do nothing. Leave it at 1"
        )
    return found


def speed_up(optimizer: Optimizer, schedulers: Iterable[Any], up: Iterable[Tensor], lr_ratio: float) -> None:
    """Give the parameters ``up`` of each group ``lr_ratio`` times the group's learning rate, in place.

    A group that holds others too is split in two, the faster part behind the slower. Every scheduler goes on with both,
    at rates in that ratio; where it ends at an absolute rate (``eta_min`` of ``CosineAnnealingLR``), both end there.

    Args:
        optimizer: An optimizer that has not stepped yet.
        schedulers: The schedulers over it, and those that they are made of.
        up: The factors ``B``.
        lr_ratio: The ratio.

    Raises:
        OptimizerError: If the optimizer has one group by its nature.
    """
    chosen = {id(p) for p in up}
    if isinstance(optimizer, LBFGS):
        raise OptimizerError("torch.optim.LBFGS has one learning rate for all parameters; use lr_ratio=1 with it")
    schedulers = list(schedulers)
    for index in reversed(range(len(optimizer.param_groups))):
        group = optimizer.param_groups[index]
        fast = [id(p) in chosen for p in group["params"]]
        if not any(fast):
            continue
        for scheduler in schedulers:
            _speed_up_schedule(scheduler, index, len(optimizer.param_groups), lr_ratio, split=not all(fast))
        faster = {key: value * lr_ratio if key in _GROUP_RATES else value for key, value in group.items()}
        if all(fast):
            group.update(faster)
        else:
            optimizer.param_groups.insert(index + 1, {**faster, **_part(group, fast)})
            group.update(_part(group, [not is_fast for is_fast in fast]))


def check_rate(name: str, value: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def _part(group: dict[str, Any], chosen: list[bool]) -> dict[str, Any]:
    """The lists of a group that have an entry for each parameter, reduced to the chosen ones."""
    keys = [key for key in ("params", "param_names") if key in group]
    return {key: [value for value, keep in zip(group[key], chosen, strict=True) if keep] for key in keys}


def _speed_up_schedule(scheduler: Any, index: int, groups: int, lr_ratio: float, *, split: bool) -> None:
    for name in _SCHEDULER_LISTS:
        values = vars(scheduler).get(name)
        if isinstance(values, list) and len(values) == groups:
            value = values[index] * lr_ratio if name in _SCHEDULER_RATES else values[index]
            # A list of its own: schedulers that are made of others may share theirs.
            setattr(scheduler, name, [*values[: index + split], value, *values[index + 1 :]])
