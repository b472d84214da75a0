"""Which Trainer set-ups the callback can honour. What it cannot is refused at ``setup``, before anything changes."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import XLAAccelerator
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.strategy import Strategy

from lightning_lora.errors import UnsupportedError, listing
from lightning_lora.optim.badam import BAdam

_CONFLICTS: dict[type[Callback], str] = {
    BaseFinetuning: "freezes and unfreezes the same parameters",
    ModelPruning: "replaces the weights below the adapters by masked ones",
}
_REFUSED: dict[type[Strategy], str] = {
    FSDPStrategy: (
        "its flat parameters cannot hold 4-bit codes, and its checkpoints gather the whole base. Use "
        "ModelParallelStrategy (FSDP2) to shard the base, or 'ddp'"
    ),
    DeepSpeedStrategy: (
        "its engine writes the checkpoints and builds the optimizer by itself. Use 'ddp', or ModelParallelStrategy to "
        "shard the base"
    ),
}
_ACCEPTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


def check_trainer(trainer: Trainer, lora: Callback) -> None:
    """Refuse what would silently break.

    Raises:
        UnsupportedError: Naming the part of the Trainer that stands in the way, and what to do.
    """
    if not isinstance(trainer, Trainer):
        raise UnsupportedError(
            f"the Trainer is from {type(trainer).__module__.partition('.')[0]}, whose classes are others than those "
            "of lightning. Import Trainer and LightningModule from lightning.pytorch"
        )
    if isinstance(trainer.accelerator, XLAAccelerator):
        raise UnsupportedError("LoRA on TPUs has not been tried. Use a CPU or a CUDA device")
    _check_strategy(trainer.strategy)
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise UnsupportedError(
            "BitsandbytesPrecision would quantize the base a second time. Drop that plugin; the callback's "
            "quantization='nf4' does it, and leaves precision='bf16-mixed' free"
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not lora and isinstance(other, type(lora)):
            raise UnsupportedError(
                "the Trainer has two LoRACallbacks (a LoRA strategy brings one of its own, and so does the lora: "
                "section of a config). Keep one"
            )
        for kind, reason in _CONFLICTS.items():
            if isinstance(other, kind):
                raise UnsupportedError(f"{type(other).__name__} {reason}. Drop one of the two callbacks")


def check_sharding(
    strategy: ModelParallelStrategy,
    *,
    merge: bool,
    output_dir: object,
    swapped: bool,
    dequantized_cache: int | None = None,
) -> None:
    """Refuse settings that need the whole model in one process, which sharding avoids.

    Raises:
        UnsupportedError: With all settings to change at once.
    """
    wanted = {
        "LoRACallback(merge=False)": merge,
        "LoRACallback(output_dir=None)": output_dir is not None,
        "LoRACallback(optimizer=None)": swapped,
        "LoRACallback(dequantized_cache=None)": dequantized_cache is not None,
        "ModelParallelStrategy(save_distributed_checkpoint=False)": strategy._save_distributed_checkpoint,
    }
    change = [setting for setting, needed in wanted.items() if needed]
    if change:
        raise UnsupportedError(
            f"over a sharded model pass {listing(change)}. Adapters are small: their checkpoint is one file, and "
            "load_from_checkpoint(...) then merge(...) in one process gives the merged model. bitsandbytes' optimizers "
            "do not know sharded parameters"
        )


def check_turns(strategy: Strategy, swap: object) -> None:
    """Refuse processes that would wait for gradients of blocks whose turn it is not.

    Raises:
        UnsupportedError: Naming the optimizers that work.
    """
    if isinstance(swap, BAdam) and not isinstance(strategy, SingleDeviceStrategy):
        raise UnsupportedError(
            f"optimizer='badam' freezes all blocks but one, and {type(strategy).__name__} expects a gradient of every "
            "parameter it began with. Use one device, or optimizer='galore_adamw'"
        )


def _check_strategy(strategy: Strategy) -> None:
    name = type(strategy).__name__
    for kind, reason in _REFUSED.items():
        if isinstance(strategy, kind):
            raise UnsupportedError(f"{name}: {reason}")
    if not isinstance(strategy, _ACCEPTED):
        raise UnsupportedError(f"{name} has not been tried. Use one device, 'ddp' or ModelParallelStrategy (FSDP2)")
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise UnsupportedError(
            f"{name} starts its processes by {strategy.launcher._start_method!r}: the adapters would be in the child "
            "processes, and be lost with them. Run a script with strategy='ddp'; in a notebook use devices=1"
        )
