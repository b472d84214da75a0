"""What the demo trains: a network with its text, tokenized.

The network is the shipped byte-level model, or a Hugging Face model of the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.cli.demo import corpus, pretrain
from lightning_lora.errors import UnsupportedError

Generate = Callable[[int], str]
PROMPT = "The "
"""What the samples before and after continue."""


@dataclass(frozen=True)
class Text:
    """Text as token windows of shape ``(count, context + 1)``, and how many bytes a token stands for."""

    name: str
    windows: Tensor
    bytes_per_token: float


@dataclass(frozen=True)
class Task:
    """A network, the text to adapt it to, what it should not forget, and how it writes.

    Attributes:
        name: What the network is, in a few words.
        network: Maps tokens to logits.
        train: Text to train on.
        held_out: The same kind of text, never trained on.
        other: Text of another kind to watch for forgetting; none for a user's own model.
        generate: Writes about so many bytes after :data:`PROMPT`.
        lr: Learning rate that suits the network.
    """

    name: str
    network: nn.Module
    train: Text
    held_out: Text
    other: Text | None
    generate: Generate
    lr: float


def byte_task(base: Path, data: Path | None) -> Task:
    """The shipped model of Python source code, to be adapted to English or to a text file."""
    network = pretrain.load_base(base)
    context = network.config.context
    text = corpus.english() if data is None else corpus.from_file(data)
    name = "English" if data is None else data.name

    def windows(name: str, tokens: Tensor, limit: int | None) -> Text:
        return Text(name, corpus.windows(tokens, context, limit=limit), 1.0)

    return Task(
        name="byte-level transformer pretrained on Python's standard library",
        network=network,
        train=windows(name, text.train, None),
        held_out=windows(name, text.held_out, 200),
        other=windows("code", corpus.code().held_out, 200),
        generate=lambda length: network.generate(PROMPT.encode(), length).decode(errors="replace"),
        lr=7e-3,
    )


def hugging_face_task(model: str, data: Path | None, *, context: int = 256) -> Task:
    """A causal language model by hub id or folder, to be adapted to English or to a text file.

    Raises:
        UnsupportedError: If transformers is not installed or the model cannot be read.
        ValueError: If the text is too short to train on.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError('--model needs transformers: pip install "lightning-lora[hf]"') from error
    try:
        tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"--model {model}: {str(error).splitlines()[0]}") from error
    text = corpus.english() if data is None else corpus.from_file(data)
    name = "English" if data is None else data.name

    def windows(tokens: Tensor, limit: int | None) -> Text:
        raw = bytes(tokens.tolist()).decode(errors="replace")
        ids = torch.tensor(tokenizer(raw)["input_ids"])
        if len(ids) <= 2 * context:
            raise ValueError(
                f"{name} has {len(ids)} tokens, too few to cut into windows of {context}; give a longer --data"
            )
        return Text(name, corpus.windows(ids, context, limit=limit), len(raw.encode()) / len(ids))

    def generate(length: int) -> str:
        prompt = tokenizer(PROMPT, return_tensors="pt").to(next(network.parameters()).device)
        torch.manual_seed(0)
        written = network.generate(  # type: ignore[misc]
            **prompt, max_new_tokens=max(length // 4, 8), do_sample=True, temperature=0.7
        )
        return str(tokenizer.decode(written[0], skip_special_tokens=True)).removeprefix(PROMPT)

    return Task(model, network, windows(text.train, None), windows(text.held_out, 50), None, generate, 2e-4)
