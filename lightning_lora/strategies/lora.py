"""``Trainer(strategy="lora")`` and its kin: the callback brought along by a strategy.

Strategies add nothing of their own. Each puts a :class:`LoRACallback` in front of the Trainer's callbacks, and all
that is done, in which order and with which checks, is the callback's.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy

from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.errors import UnsupportedError


class LoRAStrategy(SingleDeviceStrategy):
    """LoRA or QLoRA on one device, as a strategy: ``Trainer(strategy="qlora")`` or ``strategy=LoRAStrategy(r=8)``.

    Args:
        settings: The arguments of :class:`LoRACallback`. The device is the Trainer's (``accelerator``, ``devices``).

    Raises:
        UnsupportedError: If the Trainer has more than one device.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.lora = LoRACallback(**settings)
        self._devices: list[torch.device] = []

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The one device. The Trainer hands its devices to strategies that have this attribute."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise UnsupportedError(
                f"strategy 'lora' and 'qlora' train on one device, and the Trainer has {len(devices)}. Pass devices=1, "
                "or strategy='lora_ddp' or 'qlora_ddp'"
            )
        self._devices = devices
        self._root_device = devices[0]

    def connect(self, model: LightningModule) -> None:
        """Bring the callback along with the model."""
        super().connect(model)
        _bring(self.lora, model)


class LoRADDPStrategy(DDPStrategy):
    """LoRA or QLoRA on several devices, each holding the whole model; only gradients of adapters are exchanged.

    Args:
        ddp: Arguments of Lightning's ``DDPStrategy``, e.g. ``{"find_unused_parameters": True}``.
        settings: The arguments of :class:`LoRACallback`.
    """

    def __init__(self, *, ddp: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**(ddp or {}))
        self.lora = LoRACallback(**settings)

    def connect(self, model: LightningModule) -> None:
        """Bring the callback along with the model."""
        super().connect(model)
        _bring(self.lora, model)


def _bring(lora: LoRACallback, model: LightningModule) -> None:
    callbacks = model.trainer.callbacks  # type: ignore[attr-defined]
    if lora not in callbacks:
        callbacks.insert(0, lora)  # before any that copies the module in its setup


_NAMES: dict[str, tuple[type[Strategy], str | None]] = {
    "lora": (LoRAStrategy, None),
    "qlora": (LoRAStrategy, "nf4"),
    "lora_ddp": (LoRADDPStrategy, None),
    "qlora_ddp": (LoRADDPStrategy, "nf4"),
}
for _name, (_kind, _quantization) in _NAMES.items():
    StrategyRegistry.register(
        _name, _kind, description=f"{_name} fine-tuning", override=True, quantization=_quantization
    )
