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

from lightning_lora.errors import LoRAError

RUNS = {
    "fit": "fine-tune a model of yours that a YAML file names, and merge the adapters into it",
    "validate": "validate it, with the adapters of a checkpoint (--ckpt_path)",
    "test": "test it, with the adapters of a checkpoint (--ckpt_path)",
    "predict": "let it predict, with the adapters of a checkpoint (--ckpt_path)",
}
"""The subcommands that ``LoRACLI`` parses, each in a line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code.

    Returns:
        0, or after an error, told in a few lines, 2 if it lay in the arguments, else 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe may speak ASCII; progress bars do not
    options = _options(list(sys.argv[1:] if arguments is None else arguments))
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"lightning-lora {options.command}: {_told(error, options.command)}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


def _options(arguments: list[str]) -> argparse.Namespace:
    if arguments and arguments[0] in RUNS:
        given = [argument for argument in arguments if argument != "--debug"]
        return argparse.Namespace(command=given[0], run=_run, given=given, debug=given != arguments)
    return _parser().parse_args(arguments)


def _told(error: Exception, command: str) -> str:
    if isinstance(error, argparse.ArgumentError):
        return f"{error}\n(lightning-lora {command} --help lists all options)"
    kind = "" if isinstance(error, LoRAError | ValueError | OSError) else f"{type(error).__name__}: "
    return f"{kind}{error}\n(--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-lora",
        description="LoRA and QLoRA for PyTorch Lightning. Start with: lightning-lora demo",
        epilog="fit, validate, test and predict take their settings from YAML: lightning-lora fit --config run.yaml",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_demo(commands, shared)
    _add_plot(commands, shared)
    for name, text in RUNS.items():
        commands.add_parser(name, help=text, add_help=False)  # for this help alone
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


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    plot = commands.add_parser(
        "plot",
        parents=[shared],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="draw runs and adapters",
        description=(
            "Draws one picture of runs or adapters and writes it as PNG, SVG or both (extra: plot).\n\n"
            "  curves      metrics of runs over the steps, a line for each run\n"
            "  spectra     singular values of the update of each layer, and its effective rank\n"
            "  similarity  directions that two adapters share: phi of the LoRA paper, section 7.2\n"
            "  memory      what training holds: base, adapters, gradients, optimizer, activations\n"
            "  norms       how far each layer has been moved"
        ),
        epilog=(
            "A run is a folder with the metrics.csv of Lightning's CSVLogger in it or below, or that of the demo. An\n"
            "adapter is a folder with adapter_config.json, ours or PEFT's, or a .ckpt of LoRACallback.\n\n"
            "examples:\n"
            "  lightning-lora demo && lightning-lora plot lora_demo --what spectra\n"
            "  lightning-lora plot logs/version_0 logs/version_1 --what curves --metric val_loss --out loss.png\n"
            "  lightning-lora plot adapter_r8 adapter_r64 --what similarity --layers '*.q_proj' --out figures/phi"
        ),
    )
    plot.add_argument("paths", type=Path, nargs="+", metavar="RUN|ADAPTER", help="folders, or .ckpt files")
    plot.add_argument(
        "--what",
        choices=("curves", "spectra", "similarity", "memory", "norms"),
        help="which picture (default: curves of runs, spectra of an adapter, similarity of two)",
    )
    plot.add_argument(
        "--out", type=Path, help="file .png or .svg, or a name without suffix for both (default: the picture's name)"
    )
    plot.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="a curve to draw; may be given several times"
    )
    plot.add_argument(
        "--layers", action="append", default=[], metavar="GLOB", help="layers to draw; may be given several times"
    )
    plot.set_defaults(run=_plot)


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


def _plot(options: argparse.Namespace) -> int:
    from lightning_lora.cli.plot import command

    return command.plot(options)


def _run(options: argparse.Namespace) -> int:
    from lightning_lora.cli import runs

    return runs.run(options.given, RUNS)


def _doctor(options: argparse.Namespace) -> int:
    from lightning_lora.cli import doctor

    return doctor.doctor()
