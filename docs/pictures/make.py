"""Makes the pictures of docs/monitoring.md: three short fine-tunes of the demo's model, then ``lightning-lora plot``.

    python docs/pictures/make.py [--steps 200] [--out docs/pictures]

Runs offline, without a GPU, in about two minutes on two cores (extra: plot).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_lora import AdapterMonitor, LoRACallback
from lightning_lora.cli.demo import corpus, pretrain
from lightning_lora.cli.demo.model import LanguageModel
from lightning_lora.cli.main import main as lightning_lora

RUNS = {
    "qlora-r4": {"r": 4, "alpha": 8},
    "qlora-r16": {"r": 16, "alpha": 32},
    "lora-r16": {"r": 16, "alpha": 32, "quantization": None, "optimizer": None},
}


def main() -> None:
    """Train, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(Path(folder) / name, options.steps, **settings) for name, settings in RUNS.items()]
        small, large, dense = map(str, runs)
        draw = ["lora/update_norm", "lora/effective_rank", "lora/grad_norm/lora_B", "bits/byte"]
        metrics = [word for name in draw for word in ("--metric", name)]
        plot(options.out / "curves", "curves", small, large, dense, *metrics)
        plot(options.out / "spectra", "spectra", small, large)
        plot(options.out / "similarity", "similarity", small, large)
        plot(options.out / "memory", "memory", small, large, dense)
        plot(options.out / "norms", "norms", small, large)


def train(out: Path, steps: int, **settings: object) -> Path:
    """Fine-tune the demo's model on English and return the folder: the adapter, and logs below it."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    windows = corpus.windows(corpus.english().train, 128)
    draws = RandomSampler(range(len(windows)), replacement=True, num_samples=8 * steps)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[
            LoRACallback(output_dir=out, merge=False, **settings),
            AdapterMonitor(max(1, steps // 20), detail="layers"),
        ],
        logger=CSVLogger(out, name="", version="logs"),
        log_every_n_steps=max(1, steps // 20),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(pretrain.load_base(), lr=5e-3), DataLoader(TensorDataset(windows), 8, sampler=draws))
    return out


def plot(out: Path, what: str, *arguments: str) -> None:
    """Run the command."""
    if lightning_lora(["plot", *arguments, "--what", what, "--out", str(out)]):
        sys.exit(1)


if __name__ == "__main__":
    main()
