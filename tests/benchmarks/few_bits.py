"""Can a base in two bits be trained? NF2 beside NF4, with and without a start from what is lost, on the demo's text.

The demo's network, a transformer of 0.69 M parameters that reads Python source code, is adapted to English by the real
callback, in the demo's 350 steps of 8 windows of 256 bytes, with AdamW. Figures are bits per byte on English that is
not trained on; the improvement is counted from the network before it is quantized. A contender and NF4 of the same
rank have the same learning rate, alpha of twice the rank and the same draws; no rate was chosen by these figures.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from report import Claim, Report, environment
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_lora import LoRACallback
from lightning_lora.cli.demo.model import LanguageModel
from lightning_lora.cli.demo.pretrain import BASE_PATH
from lightning_lora.cli.demo.run import BATCH, bits_per_byte
from lightning_lora.cli.demo.task import Task, Text, byte_task

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
STEPS = 350
RATES = {8: 7e-3, 32: 7e-3, 64: 3e-3}


@dataclass(frozen=True)
class Contender:
    """A storage, how adapters over it start, and their rank."""

    storage: str
    init: str
    r: int

    def __str__(self) -> str:
        start = "LoftQ" if self.init == "loftq" else "plain start"
        return f"{self.storage.upper()}, {start}, r={self.r}"


NF4, NF4_WIDE = Contender("nf4", "kaiming", 8), Contender("nf4", "kaiming", 64)
LOFTQ_WIDE, PLAIN_WIDE = Contender("nf2", "loftq", 64), Contender("nf2", "kaiming", 64)
CONTENDERS = (
    NF4,
    NF4_WIDE,
    LOFTQ_WIDE,
    PLAIN_WIDE,
    Contender("nf2", "loftq", 32),
    Contender("nf2", "loftq", 8),
)


@dataclass(frozen=True)
class Outcome:
    """Bits per byte before quantizing, at the start of the training and at its end, and whether a warning came."""

    before: float
    start: float
    after: float
    warned: bool


class Start(Callback):
    """Scores the model as training begins: quantized, with adapters as they start."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.score = float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.score = bits_per_byte(pl_module, self.text)


def run(contender: Contender, task: Task, before: float, seed: int) -> Outcome:
    """Adapt the task's network, and merge."""
    seed_everything(seed, verbose=False)
    module, start = LanguageModel(task.network, lr=RATES[contender.r]), Start(task.held_out)
    draws = RandomSampler(range(len(task.train.windows)), replacement=True, num_samples=BATCH * STEPS)
    loader = DataLoader(TensorDataset(task.train.windows), batch_size=BATCH, sampler=draws)
    lora = LoRACallback(
        r=contender.r,
        alpha=2 * contender.r,
        init=contender.init,
        quantization=contender.storage,
        optimizer=None,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[start, lora], logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module, loader)
    warned = any("training starts at another model" in str(warning.message) for warning in said)
    return Outcome(before, start.score, bits_per_byte(module, task.held_out), warned)


def tabulate(outcomes: dict[Contender, list[Outcome]]) -> Report:
    """Compare improvements with NF4's."""
    gained = {c: statistics.mean(o.before - o.after for o in found) for c, found in outcomes.items()}
    rows = [
        (
            str(contender),
            f"{RATES[contender.r]:g}",
            _spread([o.start for o in found]),
            _spread([o.after for o in found]),
            f"{gained[contender]:.3f}",
            f"{100 * gained[contender] / gained[NF4]:.0f}",
            f"{100 * gained[contender] / gained[NF4_WIDE]:.0f}",
        )
        for contender, found in outcomes.items()
    ]
    seeds = len(outcomes[NF4])
    before = outcomes[NF4][0].before
    return Report(
        title=f"The demo's network over two bits, {seeds} seeds",
        command=f"OMP_NUM_THREADS={torch.get_num_threads()} python tests/benchmarks/few_bits.py --seeds {seeds}",
        columns=("base and start", "learning rate", "bits/byte at the start", "at the end", "improvement",
                 f"% of that of NF4, r={NF4.r}", f"% of that of NF4, r={NF4_WIDE.r}"),
        rows=rows,
        claims=claims(outcomes, gained),
        note=f"Before it is quantized the network has {before:.3f} bits per byte. The matrices are 128 wide: r=64 is "
        "half of full rank: a small network has little to spare for two bits, and LoftQ of the rank that NF4 is "
        "content with (r=8, and r=32) does not make up for what is lost. In large models r=64 is a small part of the "
        "rank, and their weights lose as much: what NF2 costs there has to be tried.",
    )  # fmt: skip


def claims(outcomes: dict[Contender, list[Outcome]], gained: dict[Contender, float]) -> list[Claim]:
    """What is said of NF2 with a start from what is lost, and without."""
    short = {nf4: 100 * (1 - gained[LOFTQ_WIDE] / gained[nf4]) for nf4 in (NF4, NF4_WIDE)}
    quiet = sum(
        not o.warned for c, found in outcomes.items() for o in found if c.storage == "nf2" and c.init != "loftq"
    )
    false = sum(o.warned for c, found in outcomes.items() for o in found if c.storage != "nf2" or c.init == "loftq")
    return [
        *(Claim(f"{LOFTQ_WIDE}: percent short of the improvement of {nf4}", short[nf4], 10) for nf4 in short),
        Claim(
            f"{PLAIN_WIDE}: percent of the improvement of {NF4_WIDE}", 100 * gained[PLAIN_WIDE] / gained[NF4_WIDE], 75
        ),
        Claim("runs over NF2 with a plain start that did not say so before training", quiet, 0),
        Claim("runs of the others that did", false, 0),
    ]


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def write(report: Report, folder: Path) -> None:
    """Write the page and its figures."""
    lines = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    about = (__doc__ or "").split("\n\n", 1)[1].strip()
    head = "# Learning over two bits\n\nWritten by `tests/benchmarks/few_bits.py`."
    page = f"{head} {about}\n\n{lines}\n\n{report.markdown()}"
    (folder / "few_bits.md").write_text(page)
    (folder / "few_bits.json").write_text(
        json.dumps({"environment": environment(), **report.to_json()}, indent=2) + "\n"
    )


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of batches and adapters (default 3)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where few_bits.md and .json go")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    task = byte_task(BASE_PATH, None)
    before = bits_per_byte(LanguageModel(task.network, lr=0.0), task.held_out)
    outcomes: dict[Contender, list[Outcome]] = {contender: [] for contender in CONTENDERS}
    for seed in range(arguments.seeds):
        for contender, found in outcomes.items():
            found.append(run(contender, byte_task(BASE_PATH, None), before, seed))
            print(seed, contender, found[-1], flush=True)
        report = tabulate(outcomes)
        write(report, arguments.out)  # after each seed, so that a run that is stopped leaves what it has
    print(f"\n{report.text()}")


if __name__ == "__main__":
    main()
