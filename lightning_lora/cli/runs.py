"""``lightning-lora fit|validate|test|predict``: ``LoRACLI`` for the model and data that a YAML file names."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.cli.lightning_cli import LoRACLI


class _ConsoleCLI(LoRACLI):
    """``LoRACLI`` whose errors are raised, for ``main`` to tell, and whose arguments are given to it."""

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        return super().init_parser(**{"exit_on_error": False, **settings})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Not as in LightningCLI, which warns of arguments given beside those of the command line: they are the same.
        self.config = parser.parse_args(args)


def run(arguments: Sequence[str], helps: dict[str, str]) -> int:
    """Run a subcommand of ``LoRACLI``.

    Args:
        arguments: The subcommand and its options.
        helps: What each subcommand does, for its ``--help``.

    Returns:
        The exit code.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python train.py` does; a console script finds installed modules alone
    about = {name: {"description": _description(name, text), "usage": _usage(name)} for name, text in helps.items()}
    try:
        _ConsoleCLI(args=list(arguments), parser_kwargs={"prog": "lightning-lora", **about})
    except SIGTERMException:
        return 128 + signal.SIGTERM  # a SystemExit without a code: the shell would see success
    return 0


def _usage(command: str) -> str:
    return f"lightning-lora {command} --config run.yaml [--KEY VALUE ...]"


def _description(command: str, text: str) -> str:
    return (
        f"{text[0].upper()}{text[1:]}. Example: lightning-lora {command} --config run.yaml --lora.r 8. The file holds "
        "the sections seed_everything, lora, trainer, model, data, optimizer and lr_scheduler; --print_config prints "
        "one with every value. Model and data are named by class_path, such as my_model.MyModel for a class in "
        "my_model.py of the current folder."
    )
