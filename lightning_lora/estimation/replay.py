"""One training step of a hollow model, in the order in which Lightning makes it, and the memory in use at its peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_lora.estimation.ledger import Ledger
from lightning_lora.estimation.methods import trained_parameters
from lightning_lora.estimation.setup import BLOCKS, Setup
from lightning_lora.model.blocks import named_blocks, repeated_blocks
from lightning_lora.model.dequantized import kept_weights
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.targets import output_heads

PARTS = ("base", "adapters", "trained", "gradients", "optimizer", "activations", "logits", "workspace")
"""What memory is used for. ``trained`` are weights trained whole, ``logits`` what is made from the output head on and
its gradients, ``workspace`` the rest of the backward pass: gradients in flight, weights dequantized, blocks computed
again."""

Step = Callable[[nn.Module, Any], Tensor]
"""From a model and a batch to the loss."""


@runtime_checkable
class TrainsItself(Protocol):
    """A LightningModule."""

    def training_step(self, *args: Any) -> Any:
        """Return the loss, or a mapping with ``loss``."""


def default_step(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of ``training_step(batch, 0)``, of ``model(**batch)``, or of ``model(batch)``.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(model, TrainsItself):
        output = model.training_step(batch, 0)
    else:
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(output, Mapping):
        output = output.get("loss")
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"{type(model).__name__} gives no loss for this batch. Pass step=, a function of model and batch that does"
        )
    return loss


def recompute(model: nn.Module, chosen: str | tuple[str, ...] | None) -> None:
    """Let blocks be computed again in the backward pass, as the callback does.

    Raises:
        TargetError: If a pattern fits no module.
    """
    if chosen is None:
        return
    patterns = (chosen,) if isinstance(chosen, str) else chosen
    blocks = repeated_blocks(model) if chosen == BLOCKS else named_blocks(model, patterns)
    for block in blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def replay(model: nn.Module, batch: Any, step: Step, setup: Setup, state: int, workspace: int) -> dict[str, int]:
    """Make a step that is not the first, and return the bytes of each part at its peak.

    Args:
        model: Hollow, and what is trained.
        batch: Hollow.
        step: Gives the loss.
        setup: The precision.
        state: What the optimizer keeps.
        workspace: What its update needs.
    """
    trained = list(trained_parameters(model).values())
    ledger = Ledger("activations")
    with ledger, ExitStack() as hooks:
        _hold(ledger, model)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                ledger.hold(leaf)
        for parameter in trained:  # Lightning gives those of the last step up after the forward pass
            parameter.grad = torch.empty_like(parameter)
            ledger.hold(parameter.grad, "gradients")
            handle = parameter.register_post_accumulate_grad_hook(partial(_hold_gradient, ledger))  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        seen = _watch_head(ledger, model, hooks)
        with torch.autocast("cpu", setup.dtype, enabled=setup.is_mixed):
            loss = step(model, batch)
        for weight in kept_weights(model):
            ledger.hold(weight, "base")
        for parameter in trained:
            parameter.grad = None
        if not seen:
            ledger.label = "workspace"
        loss.backward()  # type: ignore[no-untyped-call]
        update = ledger.now()
        for parameter in trained:
            parameter.grad = None
    update["workspace"] = update.get("workspace", 0) + workspace
    most = ledger.peak if sum(ledger.peak.values()) >= sum(update.values()) else update
    return {part: most.get(part, 0) for part in PARTS} | {"optimizer": state}


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by part; a tensor that stands in several places counts once."""
    ledger = Ledger("base")
    with ledger:
        _hold(ledger, model)
    return ledger.now()


def _hold(ledger: Ledger, model: nn.Module) -> None:
    adapters = {id(tensor) for layer in adapted_layers(model).values() for tensor in _tensors(layer.adapters)}
    for tensor in _tensors(model):
        label = "adapters" if id(tensor) in adapters else "trained" if tensor.requires_grad else "base"
        ledger.hold(tensor, label)


def _hold_gradient(ledger: Ledger, parameter: Tensor) -> None:
    if parameter.grad is not None:
        ledger.hold(parameter.grad, "gradients")


def _watch_head(ledger: Ledger, model: nn.Module, hooks: ExitStack) -> list[str]:
    """Put what is made from the output head on under its label, until the gradient of its input is there.

    Returns:
        The heads that have been called; filled while the model runs.
    """
    called: list[str] = []

    def label(name: str, _: Any = None) -> None:
        ledger.label = name

    def before(head: nn.Module, inputs: tuple[Any, ...]) -> None:
        called.append(type(head).__name__)
        label("logits")
        for tensor in inputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(label, "workspace"))  # type: ignore[no-untyped-call]

    for name in output_heads(model):
        hooks.callback(model.get_submodule(name).register_forward_pre_hook(before).remove)
    return called


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
