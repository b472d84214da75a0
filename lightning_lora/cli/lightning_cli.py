"""``LoRACLI``: ``LightningCLI`` with a ``lora:`` section, so that one YAML file is a whole (Q)LoRA fine-tune."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.cli.parser import LoRAArgumentParser, shortened
from lightning_lora.errors import LoRAError

if TYPE_CHECKING:
    from jsonargparse import Namespace

STRATEGIES = {"lora", "qlora", "lora_ddp", "qlora_ddp", "lorastrategy", "loraddpstrategy"}
"""Strategies that adapt the model themselves, by registered name and by class."""


class LoRACLI(LightningCLI):
    """``LightningCLI`` whose configuration has a section ``lora:`` with the arguments of :class:`LoRACallback`.

    The callback is put into the Trainer. Everything else is as in ``LightningCLI``, but that options have to be written
    out in full, and that a key which does not exist is refused with the nearest one that does::

        # train.py                                        # python train.py fit --config run.yaml --lora.r 8
        from lightning_lora import LoRACLI

        LoRACLI(MyModel, MyData)

    Args:
        *args: As for ``LightningCLI``.
        **settings: As for ``LightningCLI``; ``parser_class`` is a subclass of :class:`LoRAArgumentParser`.

    Raises:
        UnsupportedError: If jsonargparse is not installed (extra ``cli``).
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"parser_class": LoRAArgumentParser, **settings})

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``lora:`` section, first, to those of Trainer, model and data."""
        parser.add_lightning_class_args(LoRACallback, "lora")
        super().add_core_arguments_to_parser(parser)

    def instantiate_classes(self) -> None:
        """Check the ``lora:`` section before anything is built, such as a large model; then build it all."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        second = self._second_lora(config)
        if second is not None:
            self.parser.error(second)
        try:
            _build(config.lora)
        except (TypeError, ValueError, LoRAError) as error:
            self.parser.error(f"lora: {shortened(str(error))}", error)
        super().instantiate_classes()

    def _second_lora(self, config: Namespace) -> str | None:
        """Return what is wrong with a configuration in which something else adapts the model too."""
        callbacks = (config.get("trainer.callbacks"), self.trainer_defaults.get("callbacks"))
        if LoRACallback.__name__ in [_name(callback) for given in callbacks for callback in _as_list(given)]:
            return (
                "trainer.callbacks holds a LoRACallback, and the section lora: is one already. Drop it from "
                "trainer.callbacks and set its arguments in lora:"
            )
        strategy = _name(config.get("trainer.strategy"))
        if strategy.lower() in STRATEGIES:
            return (
                f"trainer.strategy {strategy} adapts the model, and so does the section lora:. Use a stock strategy "
                "(auto, ddp) and set the arguments in lora:"
            )
        return None


def _build(section: Namespace) -> None:
    """Make the callback of a ``lora:`` section, to see that it can be made."""
    parser = LoRAArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LoRACallback, "lora")
    parser.instantiate(type(section)(lora=section))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _name(value: Any) -> str:
    """The bare name of a class, given by its path in a configuration or as an instance, or a registered name."""
    path = value.class_path if isinstance(value, argparse.Namespace) else value
    return path.rpartition(".")[2] if isinstance(path, str) else type(path).__name__
