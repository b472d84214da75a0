"""``lightning-lora estimate``: builds a model without weights, estimates it, and shows table, JSON and picture."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.cli import console
from lightning_lora.errors import LoRAError, UnsupportedError
from lightning_lora.estimation.budget import Fit, fit
from lightning_lora.estimation.estimate import Estimate
from lightning_lora.estimation.estimate import estimate as estimate_of
from lightning_lora.estimation.replay import PARTS
from lightning_lora.estimation.rules import rule_of_thumb
from lightning_lora.estimation.setup import BLOCKS, Setup
from lightning_lora.model.sizes import parse_size

Batch = Callable[[int, int], Any]
"""From sequences and tokens to a batch on the meta device."""


def estimate(options: Namespace) -> int:
    """Estimate what the options ask for, show it and return the exit code.

    Raises:
        LoRAError: If there is no such model.
        ValueError: If an option is none of the choices.
    """
    setups = [_setup(options, method) for method in options.method or ["qlora-4bit"]]
    budget = None if options.gpu is None else parse_size("--gpu", options.gpu)
    model, batch_of = read_model(options.model)
    found = [estimate_of(model, batch_of(options.batch, options.seq), setup) for setup in setups]

    def total(setup: Setup, batch: int, seq: int) -> int:
        return estimate_of(model, batch_of(batch, seq), setup).total

    fits = [fit(total, s, budget, batch=options.batch, seq=options.seq) for s in setups] if budget else []
    if options.json:
        print(json.dumps(_as_json(found, fits), indent=2))
    else:
        _show(options, found, fits)
    if options.out is not None:
        _draw(found, options.out, f"{options.model}: batch {options.batch}, {options.seq} tokens")
    return 0 if all(each.setup for each in fits) else 1


def read_model(given: str) -> tuple[nn.Module, Batch]:
    """Build a model on the meta device, and say what a batch of it looks like.

    Args:
        given: A ``config.json``, a folder with one, or ``package.module.Class``.

    Raises:
        LoRAError: If it is none of them, or gives no module.
        UnsupportedError: If transformers is needed and not installed.
    """
    path = Path(given)
    if path.exists():
        return _from_config(path), _language_batch
    name, _, attribute = given.replace(":", ".").rpartition(".")
    try:
        maker = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LoRAError(
            f"--model {given}: neither a config.json, nor a folder with one, nor a class that can be imported "
            f"({error}). Nothing is looked up on a hub: download the model's config.json"
        ) from None
    with torch.device("meta"):
        model = maker()
    if not isinstance(model, nn.Module):
        raise LoRAError(f"--model {given} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model, _token_batch


def _from_config(path: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError('a model by its config needs transformers: pip install "lightning-lora[hf]"') from error
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise LoRAError(f"--model {path} is no config of a causal language model: {error}") from None
    assert isinstance(model, nn.Module)
    return model


def _language_batch(batch: int, seq: int) -> dict[str, Any]:
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _token_batch(batch: int, seq: int) -> torch.Tensor:
    return torch.zeros(batch, seq, dtype=torch.long, device="meta")


def _setup(options: Namespace, method: str) -> Setup:
    return Setup(
        method=method,
        r=options.r,
        targets=tuple(options.targets) if options.targets else "all-linear",
        embeddings=options.embeddings,
        dequantized_cache=0 if options.cache is None else parse_size("--dequantized-cache", options.cache),
        precision=options.precision,
        optimizer=options.optimizer,
        activation_checkpointing=BLOCKS if options.checkpointing else None,
    )


def _as_json(found: list[Estimate], fits: list[Fit]) -> list[dict[str, Any]]:
    rows = [{**each.to_dict(), "rule_of_thumb_GB": _rule(each)} for each in found]
    for row, its in zip(rows, fits, strict=False):
        row["fit"] = asdict(its)
    return rows


def _rule(found: Estimate) -> int | None:
    rule = rule_of_thumb(found.setup.method, found.parameters)
    return rule[1] if rule else None


def _show(options: Namespace, found: list[Estimate], fits: list[Fit]) -> None:
    rows = [[part, *(_size(each.parts[part]) for each in found)] for part in PARTS]
    rows.append(["total", *(_size(each.total) for each in found)])
    rules = [_rule(each) for each in found]
    if any(rules):
        rows.append(["LLaMA-Factory's rule of thumb", *map(_beside, found, rules)])
    what = f"{options.model}: {found[0].parameters:,} parameters, batch {options.batch}, {options.seq} tokens"
    console.table(what, ["part", *(each.setup.method for each in found)], rows)
    for each in found:
        for note in each.notes:
            console.line(f"{each.setup.method}: {note}")
    for each, its in zip(found, fits, strict=False):
        console.line(f"{each.setup.method}: {_told(its, options)}")


def _beside(found: Estimate, rule: int | None) -> str:
    """The rule's figure, and on which side of it ours lies."""
    return "-" if rule is None else f"{rule} GB, ours {'below' if found.total < rule * 1e9 else 'above'}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.2f} MB"


def _told(its: Fit, options: Namespace) -> str:
    if its.setup is None:
        return f"takes {_size(its.total)}, and nothing that could be switched on makes it fit {options.gpu}"
    how = f"fits {options.gpu} with {', '.join(its.changes)}" if its.changes else f"fits {options.gpu}"
    return (
        f"{how} ({_size(its.total)}); at most {its.batch} x {options.seq} tokens, or {options.batch} x "
        f"{max(its.seq, options.seq)}"
    )


def _draw(found: list[Estimate], out: Path, title: str) -> None:
    from lightning_lora.cli.plot import memory
    from lightning_lora.cli.plot.style import save, styled

    names = {"trained": "trained along"}
    bars = {
        each.setup.method: {names.get(part, part): size / 2**20 for part, size in each.parts.items()} for each in found
    }
    with styled():
        files = save(memory.draw(bars, title=title), out)
    console.line(f"wrote {', '.join(map(str, files))}")
