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
    _add_merge(commands, shared)
    _add_files(commands, shared)
    _add_plot(commands, shared)
    _add_estimate(commands, shared)
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


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    merge = commands.add_parser(
        "merge",
        parents=[shared],
        allow_abbrev=False,
        help="merge an adapter folder into its base model's files",
        description=(
            "Writes the merged model as safetensors with the base's own names, config and tokenizer. One layer is in "
            "memory at a time and the model is never built, so its code is not needed. Nothing is written unless the "
            "adapter is sound, belongs to this base, and every merged weight is finite."
        ),
        epilog="example:  lightning-lora merge --base ./my-llama --adapter ./out --out ./merged --dtype bfloat16",
    )
    merge.add_argument("--base", type=Path, required=True, help="folder of the base model, in safetensors")
    merge.add_argument("--adapter", type=Path, required=True, help="adapter folder, ours or PEFT's")
    merge.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    merge.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help=(
            "add the update to the weights it was trained on (over a 4-bit base: dequantized), or to the original "
            "ones, which gives another function and says how far off (default: %(default)s)"
        ),
    )
    dtypes = ("float32", "bfloat16", "float16")
    merge.add_argument("--dtype", choices=dtypes, help="what to store numbers in (default: as the base does)")
    merge.add_argument("--max-shard-size", default="5GB", help="bytes of a file at most (default: %(default)s)")
    merge.add_argument("--allow-base-mismatch", action="store_true", help="merge into a base that was not trained on")
    merge.set_defaults(run=_merge)


def _add_files(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    inspect = commands.add_parser(
        "inspect",
        parents=[shared],
        allow_abbrev=False,
        help="say what an adapter folder, a checkpoint or a merged model holds",
        description=(
            "Prints method, rank, targets, sizes, the base it belongs to, the norms of every layer's update, and which "
            "programs can read it."
        ),
    )
    inspect.add_argument("path", help="adapter folder, .ckpt file, or folder of a merged model or a quantized base")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify",
        parents=[shared],
        allow_abbrev=False,
        help="check that such a file is sound, and belongs to a base",
        description="Exit code 0 if all is sound; else 1, with one line that names the file, the reason and the fix.",
    )
    verify.add_argument("path", help="adapter folder, .ckpt file, or folder of a merged model")
    verify.add_argument("--base", type=Path, help="folder of the base model, in safetensors")
    verify.set_defaults(run=_verify)
    convert = commands.add_parser(
        "convert",
        parents=[shared],
        allow_abbrev=False,
        help="turn a checkpoint into an adapter folder, or back; or a pickled adapter into safetensors",
        description=(
            "A .ckpt becomes an adapter folder; an adapter folder becomes a .ckpt of weights alone; a folder with "
            "adapter_model.bin becomes one with adapter_model.safetensors. No code in a pickle is run."
        ),
    )
    convert.add_argument("path", help="what to convert")
    convert.add_argument("--out", type=Path, required=True, help="folder, or .ckpt file, to write")
    convert.add_argument(
        "--prefix", help="what names in the checkpoint begin with and names in the folder do not: net."
    )
    convert.set_defaults(run=_convert)


def _inspect(options: argparse.Namespace) -> int:
    from lightning_lora.cli import files

    return files.inspect(options)


def _verify(options: argparse.Namespace) -> int:
    from lightning_lora.cli import files

    return files.verify(options)


def _convert(options: argparse.Namespace) -> int:
    from lightning_lora.cli import files

    return files.convert(options)


def _merge(options: argparse.Namespace) -> int:
    from lightning_lora.cli import merging

    return merging.merge(options)


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


def _add_estimate(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser
) -> None:
    estimate = commands.add_parser(
        "estimate",
        parents=[shared],
        allow_abbrev=False,
        help="say how much memory a fine-tune takes, before it runs and without weights",
        description=(
            "Makes one training step of the model without values, and shows what it allocates: base, adapters, "
            "gradients, optimizer, activations, logits, workspace. Needs the model's config or code, not its weights."
        ),
        epilog=(
            "example:  lightning-lora estimate --model ./my-llama/config.json --method qlora-4bit --seq 2048 "
            "--checkpointing --gpu 24GB"
        ),
    )
    estimate.add_argument(
        "--model",
        required=True,
        help="config.json or folder of a Hugging Face causal language model (extra: hf), or package.module.Class of a "
        "module that is made without arguments and takes token ids",
    )
    estimate.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="full, freeze, lora, qlora-8bit, qlora-4bit, qlora-3bit, qlora-2bit, galore or badam; may be given "
        "several times (default: qlora-4bit)",
    )
    estimate.add_argument("--r", type=_positive, default=16, help="rank of the adapters (default: %(default)s)")
    estimate.add_argument(
        "--targets",
        action="append",
        metavar="NAME",
        help="name or glob of layers to adapt and quantize; may be given several times, stacked experts have to be "
        "named (default: all-linear)",
    )
    estimate.add_argument("--embeddings", choices=("int8",), help="store embeddings and output heads in 8 bit")
    estimate.add_argument(
        "--dequantized-cache", dest="cache", metavar="4GB", help="keep so much of the quantized base dequantized"
    )
    estimate.add_argument("--seq", type=_positive, default=512, help="tokens of a sequence (default: %(default)s)")
    estimate.add_argument("--batch", type=_positive, default=1, help="sequences at once (default: %(default)s)")
    estimate.add_argument("--checkpointing", action="store_true", help="compute each block again in the backward pass")
    estimate.add_argument(
        "--precision", default="bf16-true", help="of the Trainer: bf16-true, 16-true, 32-true, bf16-mixed, 16-mixed"
    )
    estimate.add_argument(
        "--optimizer",
        default="paged_adamw_8bit",
        help="paged_adamw_8bit, adamw or paged_adamw_32bit (default: %(default)s)",
    )
    estimate.add_argument("--gpu", metavar="24GB", help="say what fits in so much memory; GB is 10^9 bytes, GiB 2^30")
    estimate.add_argument("--json", action="store_true", help="print it as JSON")
    estimate.add_argument(
        "--out", type=Path, help="draw it too: file .png or .svg, or a name without suffix for both (extra: plot)"
    )
    estimate.set_defaults(run=_estimate)


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


def _estimate(options: argparse.Namespace) -> int:
    from lightning_lora.cli import estimating

    return estimating.estimate(options)


def _run(options: argparse.Namespace) -> int:
    from lightning_lora.cli import runs

    return runs.run(options.given, RUNS)


def _doctor(options: argparse.Namespace) -> int:
    from lightning_lora.cli import doctor

    return doctor.doctor()
