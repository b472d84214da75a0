"""The parser of ``LoRACLI``: options by their full names alone, and errors in a few lines that name the nearest one."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.errors import UnsupportedError, listing

NAMES_ELSEWHERE = {
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "train",
    "init_lora_weights": "init",
    "use_rslora": "scaling",
}
"""What the callback's arguments are called elsewhere: no spelling would lead from one to the other."""

SHORT_NAMES = (LightningModule, LightningDataModule, Callback, Optimizer, LRScheduler)
"""Classes whose imported subclasses may be named without their module."""

# What jsonargparse says of a key that a parser does not have; a message it words otherwise is told as it is.
_UNKNOWN_OPTIONS = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_UNKNOWN_KEY = re.compile(
    r"(?:(?:Subcommand '[^']+'|Group '(?P<group>[^']+)') does not accept option|Option) '(?P<key>[^']+)'"
    r"(?! is not accepted before)"
)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_WHERE = re.compile(r'Parser key "([^"]+)":')
# The lines of a failed union that say how it was tried rather than what is wrong.
_ATTEMPTS = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Expected a path but",
    "Not a valid subclass",
    "Subclass types expect",
    "a class path (str)",
    "a dict with",
)


class LoRAArgumentParser(LightningArgumentParser):
    """Lightning's parser without abbreviated options, and with errors that say what to write instead.

    The parsers that jsonargparse makes for the arguments of a model, a callback or an optimizer are of this class too,
    so each names what it knows.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        try:
            super().__init__(*args, **{"allow_abbrev": False, **settings})
        except ModuleNotFoundError as error:
            raise UnsupportedError('a run from YAML needs jsonargparse: pip install "lightning-lora[cli]"') from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Tell what is wrong, where, and what to write; exit with 2, or raise with ``exit_on_error=False``."""
        parser = getattr(ex, "subcommand_parser", None) or self
        told = explained(message, parser.names())
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, told) from ex
        prog = parser.prog.replace(" [options]", "")
        self.exit(2, f"{prog}: {told}\n({prog} --help lists all options)\n")

    def names(self) -> list[str]:
        """Every key that stands in this parser, dotted."""
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]


def explained(message: str, names: Iterable[str]) -> str:
    """Rewrite an error of jsonargparse into what, where and fix; one it does not know is shortened alone.

    Args:
        message: What jsonargparse says.
        names: The keys that would have been right where it says so.
    """
    names = [name for name in names if name.rpartition(".")[2] != "help"]
    options = _UNKNOWN_OPTIONS.match(message)
    if options:
        unknown = [word.partition("=")[0] for word in options[1].split() if word.startswith("--")]
        return " ".join(_no_such("option", word, names, "--") for word in unknown) or message
    key = _UNKNOWN_KEY.match(message)
    if key:
        return _no_such("key", f"{key['group']}.{key['key']}" if key["group"] else key["key"], names, "")
    return shortened(message)


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name a misspelt or abbreviated key most likely stands for."""
    names = list(names)
    group, dot, leaf = key.rpartition(".")
    elsewhere = f"{group}{dot}{NAMES_ELSEWHERE.get(leaf, '')}"
    if elsewhere in names:
        return elsewhere
    begun = sorted((name for name in names if name.startswith(key)), key=len)
    misplaced = [name for name in names if name.rpartition(".")[2] == leaf]
    return next(iter(begun + misplaced + difflib.get_close_matches(key, names, n=1)), None)


def shortened(message: str) -> str:
    """Keep of jsonargparse's account of a failed value the key, and what was wrong."""
    where = _WHERE.match(message)
    lines = [line.strip().removeprefix("- ") for line in message[where.end() if where else 0 :].splitlines()]
    lines = [line for line in lines if line and not line.startswith(_ATTEMPTS)]
    problems = [line for line in lines if not line.startswith(("Expected a", "Given value:"))]
    told = "; ".join(dict.fromkeys(problems or lines)).replace(":; ", ": ")
    told = re.sub(r"(?:Problem with given class_path |<class )'([^']+)'>?", r"\1", told)
    missing = _NO_CLASS.search(message)
    if missing:
        told = _no_class(missing[1])
    elif "No module named" in told:
        told += ". Modules are looked for in the installed packages and in the current folder"
    return f"{where[1]}: {told}" if where else told


def _no_such(what: str, key: str, names: list[str], dashes: str) -> str:
    if key == "class_path":
        return "beside class_path only init_args and dict_kwargs may stand. Write the arguments under init_args"
    found = nearest(key.removeprefix(dashes), names)
    if found is not None:
        return f"there is no {what} {key}. Did you mean {dashes}{found}?"
    sections = dict.fromkeys(name.partition(".")[0] for name in names)
    return f"there is no {what} {key}. Known here: {listing(sections, limit=20)}"


def _no_class(name: str) -> str:
    known = sorted({found.__name__ for kind in SHORT_NAMES for found in _subclasses(kind)})
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"Did you mean {close[0]}? If not, give" if close else "Give"
    return f"no imported class is called {name}. {meant} the full path, such as my_module.{name}"


def _subclasses(kind: type) -> set[type]:
    direct: set[type] = set(kind.__subclasses__())
    return direct.union(*(_subclasses(found) for found in direct))
