"""The ``lightning-lora`` command.

Each subcommand imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, or 1 after an error that was told in a few lines."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe may speak ASCII; progress bars do not
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"lightning-lora {options.command}: {error}\n(--debug shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-lora",
        description="LoRA and QLoRA for PyTorch Lightning. Start with: lightning-lora demo",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_demo(commands, shared)
    doctor = commands.add_parser(
        "doctor",
        parents=[shared],
        allow_abbrev=False,
        help="check what works on this machine",
        description=(
            "Try each part on this machine for real (LoRA, NF4 on the CPU and on CUDA, the paged 8-bit AdamW) and say "
            "what works, what does not, and how to mend it."
        ),
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo",
        parents=[shared],
        allow_abbrev=False,
        help="fine-tune a small model now, offline, without a GPU",
        description=(
            "QLoRA-adapts a small language model of Python code to English: adapters injected by the callback, base "
            "in NF4, paged 8-bit AdamW, merged at the end. Takes about a minute on two cores, needs no network, and "
            "shows held-out bits per byte before and after."
        ),
        epilog=(
            "examples:  lightning-lora demo   |   lightning-lora demo --data notes.txt   |   lightning-lora demo "
            "--model ./my-llama --data notes.txt --steps 100"
        ),
    )
    demo.add_argument(
        "--out", type=Path, default=Path("lora_demo"), help="folder for adapter, merged weights, pictures and report"
    )
    demo.add_argument("--steps", type=_positive, default=350, help="training steps of 8 windows (default: %(default)s)")
    demo.add_argument("--r", type=_positive, default=8, help="rank of the adapters (default: %(default)s)")
    demo.add_argument("--model", help="a Hugging Face causal language model instead, by hub id or folder (extra: hf)")
    demo.add_argument(
        "--data", type=Path, help="a text file to adapt to instead of English; its last tenth is held out"
    )
    demo.add_argument(
        "--pretrain",
        action="store_true",
        help="first rebuild the base model from the standard library (about 20 minutes)",
    )
    demo.set_defaults(run=_demo)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _demo(options: argparse.Namespace) -> int:
    from lightning_lora.cli.demo import pretrain, run, task

    if options.data is not None and not options.data.is_file():
        raise FileNotFoundError(f"--data {options.data}: no such file")
    if options.model is not None:
        chosen = task.hugging_face_task(options.model, options.data)
    else:
        base = pretrain.BASE_PATH
        if options.pretrain:
            options.out.mkdir(parents=True, exist_ok=True)
            base = options.out / "base.safetensors"
            pretrain.pretrain(base)
        chosen = task.byte_task(base, options.data)
    run.run(chosen, options.out, steps=options.steps, r=options.r)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from lightning_lora.cli import doctor

    return doctor.doctor()
