"""What has to hold when several processes train one model: equal bases, reduced gradients, no needless traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError, UnsupportedError, listing
from lightning_lora.model.checksum import bit_sum
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(value: Any) -> list[Any]:
    """Return the value of every process, in the order of ranks. All processes have to call it."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def require_equal_bases(weights: Mapping[str, Tensor]) -> None:
    """See that all processes hold the same weights before they are quantized.

    DistributedDataParallel makes unequal weights equal by sending those of the first process to all. Weights of few
    bits would arrive so too, but what each process has quantized, merges and saves would not be the same model.

    Raises:
        QuantizationError: On every process, naming the layers.
    """
    if world_size() == 1:
        return
    here = {name: bit_sum(weight) for name, weight in weights.items()}
    others = gather(here)
    unequal = [name for name in here if any(other.get(name) != here[name] for other in others)]
    if unequal:
        raise QuantizationError(
            f"the base weights of {listing(unequal)} are not the same in all {world_size()} processes. Load the same "
            "weights in each, or call seed_everything(...) before the model is built"
        )


def spare_quantized_buffers(module: LightningModule) -> Callable[[], None]:
    """Tell DistributedDataParallel to pass over the packed weights, and return what takes that back.

    It sends all buffers of the first process to the others before every forward (``broadcast_buffers``), which would be
    the whole base each time. They are known to be equal and never change, and so are the starts they were packed
    without.
    """
    packed = [
        f"{path}.{name}"
        for path, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear) or (isinstance(layer, AdaptedLayer) and layer.base_lacks is not None)
        for name, _ in layer.named_buffers()
    ]
    before = vars(module).get(_IGNORED)
    # What DistributedDataParallel._set_params_and_buffers_to_ignore_for_model sets, less its marks on the tensors.
    vars(module)[_IGNORED] = [*(before or ()), *packed]
    return partial(_restore, module, before)


def require_sharded(module: nn.Module) -> None:
    """See that FSDP2 reduces the gradient of every trained parameter.

    Raises:
        UnsupportedError: Naming those it does not know; each process would train its own copy of them.
    """
    loose = [name for name, p in module.named_parameters() if p.requires_grad and not is_sharded(p)]
    if loose and world_size() > 1:
        raise UnsupportedError(
            f"{len(loose)} trained parameters are not sharded, so their gradients would not be reduced and processes "
            f"would drift apart: {listing(loose)}. In configure_model, call inject(self, ...) before fully_shard, and "
            "fully_shard(self) last"
        )


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    if not dist.is_available():  # there are builds of torch without it
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _restore(module: LightningModule, before: Any) -> None:
    if before is None:
        vars(module).pop(_IGNORED, None)
    else:
        vars(module)[_IGNORED] = before
