"""Making a module's own optimizers train exactly the adapters, with their schedulers kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_lora.errors import OptimizerError, listing
from lightning_lora.optim.lora_plus import factors_up, speed_up
from lightning_lora.optim.swaps import FOR_FULL_TRAINING, Swap
from lightning_lora.optim.takeover import FIX, optimizer_name, replaceable

Scheduler = LRScheduler | ReduceLROnPlateau


def rewrite_optimizers(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[Scheduler],
    *,
    swap: Swap | None,
    lr_ratio: float = 1.0,
    owners: Mapping[Tensor, Iterable[nn.Module]] | None = None,
    names: Mapping[Tensor, str] | None = None,
) -> list[Optimizer]:
    """Return optimizers over exactly the trainable parameters of ``model``.

    Frozen parameters are taken out of every group, whatever the class. An adapter that is in no optimizer joins the
    group that holds the weight of its layer, and so gets the learning rate and weight decay meant for that layer: this
    is how an optimizer works that was built before the adapters were. With ``swap``, ``torch.optim.Adam`` and ``AdamW``
    become what it builds, and every scheduler goes on with the new one; optimizers of other classes are kept.

    Args:
        model: A model with adapters.
        optimizers: What ``configure_optimizers`` returned, not stepped yet.
        schedulers: The schedulers over them, changed in place.
        swap: What Adam and AdamW become; None keeps them.
        lr_ratio: What the learning rate of the factors ``B`` is multiplied by (LoRA+); groups are split for it.
        owners: The adapted layers that each weight of the original model went into, by identity.
        names: Names of parameters, under which the paged 8-bit AdamW saves their moments.

    Raises:
        OptimizerError: If an optimizer holds no trainable parameter, if a trainable one is in none, or if a swap would
            change what is computed.
    """
    _add_adapters(model, optimizers, owners or {})
    _check_coverage(model, optimizers)
    for optimizer in optimizers:
        _drop_frozen(optimizer)
    schedulers = list(schedulers)
    if lr_ratio != 1:
        up = factors_up(model, lr_ratio)
        for optimizer in optimizers:
            speed_up(optimizer, _driving(optimizer, schedulers), up, lr_ratio)
    if swap is None:
        return list(optimizers)
    if isinstance(swap, FOR_FULL_TRAINING):
        _refuse_others(optimizers, swap)
    swapped: dict[Optimizer, Optimizer] = {
        optimizer: swap.build(optimizer, model, names or {}) for optimizer in optimizers if replaceable(optimizer)
    }
    for scheduler in schedulers:
        for part in _with_parts(scheduler):
            _repoint(part, swapped)
    return [swapped.get(optimizer, optimizer) for optimizer in optimizers]


def check_references(owner: object, built: Sequence[Optimizer], used: Sequence[Optimizer]) -> None:
    """See that a module which steps its optimizers by itself holds none that was replaced.

    Raises:
        OptimizerError: Naming the attribute; stepping that optimizer would change nothing.
    """
    replaced = {id(optimizer) for optimizer in built} - {id(optimizer) for optimizer in used}
    for name, value in vars(owner).items():
        for item in value if isinstance(value, list | tuple) else (value,):
            if id(item) in replaced:
                raise OptimizerError(
                    f"self.{name} is a {optimizer_name(item)} that the callback has replaced, and stepping it "
                    f"would change nothing. Take the optimizer from self.optimizers() in training_step. {FIX}"
                )


def _add_adapters(
    model: nn.Module, optimizers: Sequence[Optimizer], owners: Mapping[Tensor, Iterable[nn.Module]]
) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        layers = [layer for p in group["params"] if p in owners for layer in owners[p]]
        new = [p for layer in layers for p in layer.parameters() if p.requires_grad and id(p) not in held]
        group["params"].extend(new)  # in place: LBFGS keeps the list itself
        if "param_names" in group:
            group["param_names"].extend(names[id(p)] for p in new)
        held |= {id(p) for p in new}


def _check_coverage(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held: set[int] = set()
    for index, optimizer in enumerate(optimizers):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]} & trainable.keys()
        if not mine:
            raise OptimizerError(
                f"optimizer {index} ({type(optimizer).__name__}) holds no adapter and nothing else that is trained, so "
                "its steps would change nothing. "
                "Build it from self.parameters() in configure_optimizers (frozen parameters are taken out for you)"
            )
        held |= mine
    missing = [name for key, name in trainable.items() if key not in held]
    if missing and optimizers:
        raise OptimizerError(
            f"{len(missing)} of {len(trainable)} trainable parameters are in no optimizer and would stay as they are: "
            f"{listing(missing)}. Pass self.parameters() in configure_optimizers, or exclude those layers"
        )


def _refuse_others(optimizers: Iterable[Optimizer], swap: Swap) -> None:
    """What was asked for by name is not to be left out."""
    others = [optimizer for optimizer in optimizers if not replaceable(optimizer)]
    if others:
        raise OptimizerError(
            f"optimizer={swap.name!r} takes the place of torch.optim.Adam and AdamW, and configure_optimizers returns "
            f"{listing(type(optimizer).__name__ for optimizer in others)}. Return torch.optim.AdamW there, or pass "
            "optimizer=None"
        )


def _drop_frozen(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        names = group.get("param_names")
        if names is not None:
            group["param_names"] = [name for name, p in zip(names, group["params"], strict=True) if p.requires_grad]
        group["params"][:] = [p for p in group["params"] if p.requires_grad]  # in place: LBFGS keeps the list itself


def _driving(optimizer: Optimizer, schedulers: Iterable[Scheduler]) -> list[Scheduler]:
    """The schedulers of one optimizer, with those that they are made of or wrap."""
    found = [inner for scheduler in schedulers for inner in _with_parts(scheduler)]
    return [scheduler for scheduler in dict.fromkeys(found) if scheduler.optimizer is optimizer]


def _with_parts(scheduler: Scheduler) -> Iterator[Scheduler]:
    yield scheduler
    for value in vars(scheduler).values():
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, Scheduler):
                yield from _with_parts(inner)


def _repoint(scheduler: Any, swapped: Mapping[Optimizer, Optimizer]) -> None:
    """Let a scheduler drive the new optimizer."""
    new = swapped.get(scheduler.optimizer)
    if new is None:
        return
    scheduler.optimizer = new
    # A scheduler counts the steps of its optimizer through a wrapper it puts around `step`, to warn when it is stepped
    # first. It does so when it is built, and only then (torch/optim/lr_scheduler.py); the new optimizer needs the same
    # wrapper.
    patch = getattr(scheduler, "_initial_step", None)
    if patch is not None and not hasattr(new.step, "_wrapped_by_lr_sched"):
        _count_steps(new)


def _count_steps(optimizer: Any) -> None:
    step = optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(*args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = counted
