"""Which Trainer set-ups the callback can honour. What it cannot is refused at ``setup``, before anything changes."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_lora.errors import UnsupportedError

_CONFLICTS: dict[type[Callback], str] = {
    WeightAveraging: "averages every parameter by position, which a merge and a quantized base both break",
    StochasticWeightAveraging: "averages every parameter by position, which a merge and a quantized base both break",
    BaseFinetuning: "freezes and unfreezes the same parameters",
}


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would silently break.

    Raises:
        UnsupportedError: Naming the part of the Trainer that stands in the way, and what to do.
    """
    if not isinstance(trainer, Trainer):
        raise UnsupportedError(
            f"the Trainer is from {type(trainer).__module__.partition('.')[0]}, whose classes are others than those "
            "of lightning. Import Trainer and LightningModule from lightning.pytorch"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UnsupportedError(
            f"strategy {type(trainer.strategy).__name__}: this version trains on one device. Pass Trainer(devices=1, "
            "strategy='auto')"
        )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise UnsupportedError(
            "BitsandbytesPrecision would quantize the base a second time. Drop that plugin; the callback's "
            "quantization='nf4' does it, and leaves precision='bf16-mixed' free"
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _CONFLICTS.items():
            if isinstance(other, kind):
                raise UnsupportedError(f"{type(other).__name__} {reason}. Drop one of the two callbacks")
