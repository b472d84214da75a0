"""Activations given up and computed again in the backward pass, for the blocks of a run; undone when it ends.

The blocks' ``forward`` is wrapped on the instances, so that no name in the model changes. Recomputation stops where the
last tensor that is needed has been made (``use_reentrant=False``), and draws the same dropout again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.callbacks.wraps import Undo, substitute_forward
from lightning_lora.errors import listing
from lightning_lora.model.blocks import named_blocks, repeated_blocks

AUTO = "auto"
MARGIN = 0.8
"""How much of the free memory the activations of all blocks may take: the rest is for the head, the loss and gradients
in flight. Chosen, not measured."""

Memory = Callable[[], tuple[int, int]]
"""Bytes that are allocated now, and bytes that could be."""


def checkpoint_blocks(model: nn.Module, chosen: str | tuple[str, ...], device: torch.device) -> list[Undo]:
    """Let blocks of ``model`` be recomputed, and return what undoes that.

    Args:
        model: The model, adapted.
        chosen: Patterns; or ``"auto"``: on a CPU nothing, on a GPU the repeated blocks if they do not fit.
        device: Where it runs.

    Raises:
        TargetError: If a pattern fits no module.
    """
    if chosen != AUTO:
        blocks = named_blocks(model, (chosen,) if isinstance(chosen, str) else chosen)
        rank_zero_info(f"LoRA: activations of {listing(blocks)} are recomputed in the backward pass")
        return [substitute_forward(block, partial(_recomputed, block.forward)) for block in blocks.values()]
    if device.type != "cuda":
        return []
    return fit_by_itself(repeated_blocks(model), partial(_cuda_memory, device))


def fit_by_itself(blocks: dict[str, nn.Module], memory: Memory) -> list[Undo]:
    """Let blocks be recomputed from the second on, as soon as what the first one keeps says that all would not fit."""
    decision = _Decision(len(blocks), memory)
    first = next(iter(blocks), None)
    return [
        substitute_forward(block, partial(decision.watched if name == first else decision.followed, block.forward))
        for name, block in blocks.items()
    ]


class _Decision:
    """Whether the activations of all blocks fit, by those of the first; once they do not, they never will."""

    def __init__(self, count: int, memory: Memory) -> None:
        self.count = count
        self.memory = memory
        self.recompute = False

    def watched(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.recompute or not torch.is_grad_enabled():
            return self.followed(forward, *args, **kwargs)
        before, free = self.memory()
        output = forward(*args, **kwargs)
        kept = self.memory()[0] - before
        if kept * self.count > MARGIN * free:
            self.recompute = True
            rank_zero_info(
                f"LoRA: {self.count} blocks that keep {kept / 2**20:.0f} MiB of activations each do not fit into "
                f"{free / 2**20:.0f} MiB, so they are recomputed in the backward pass (activation_checkpointing='auto')"
            )
        return output

    def followed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _recomputed(forward, *args, **kwargs) if self.recompute else forward(*args, **kwargs)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _cuda_memory(device: torch.device) -> tuple[int, int]:
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    return allocated, torch.cuda.mem_get_info(device)[0] + unused
