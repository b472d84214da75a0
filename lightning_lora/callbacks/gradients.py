"""Seeing that gradients reach the adapters: a run whose adapters never change must not look like training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import GradientError, listing

_CAUSES = (
    "Causes seen: activation checkpointing with use_reentrant=True over a frozen input (pass use_reentrant=False); a "
    "forward under torch.no_grad() or through .detach(); a layer the model does not call for every batch (exclude= it)"
)


def check_loss(loss: Tensor) -> None:
    """Raise ``GradientError`` if no trainable parameter took part in the loss."""
    if not loss.requires_grad:
        raise GradientError(
            f"the loss depends on no adapter and nothing else that is trained, so nothing can be trained. {_CAUSES}"
        )


def check_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ``GradientError`` naming the adapter tensors that ``optimizer`` holds and no gradient has reached."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    mine = {name: p for name, p in model.named_parameters() if id(p) in held and ".adapters." in name}
    dead = [name for name, p in mine.items() if p.grad is None]
    if dead:
        raise GradientError(
            f"no gradient reached {len(dead)} of {len(mine)} adapter tensors: {listing(dead)}. {_CAUSES}"
        )
