"""A vision transformer and a convolutional network, adapted to pictures that are turned by a quarter.

It shows adapters on attention (``nn.MultiheadAttention``), linear layers and convolutions of networks written by hand,
each with a rank of its own. Each network first learns upright pictures with all its weights; then the camera is
turned, and a few hundred turned pictures adapt it: the head alone, LoRA, QLoRA (linear layers in 4 bits; convolutions
keep their precision) and full fine-tuning. The pictures are scikit-learn's digits, or a folder with one folder of
pictures for each class::

    python examples/vision.py --data my_pictures

It prints the accuracy on held-out turned pictures for each network and method, and what was trained.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import LoRACallback


class ViT(nn.Module):
    """A small vision transformer: patches, a learned position for each, three blocks, their mean, a head.

    Args:
        channels: Of the pictures.
        size: Their height and width, a multiple of four.
        classes: To tell apart.
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        patch = size // 4
        self.patches = nn.Conv2d(channels, 64, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(16, 64) * 0.02)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 3, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, size, size)`` pictures to ``(batch, classes)`` logits."""
        logits: Tensor = self.head(self.blocks(self.patches(x).flatten(2).mT + self.position).mean(1))
        return logits


class ConvNet(nn.Module):
    """Three convolutions, the mean over the picture, a hidden layer, a head; arguments as of :class:`ViT`."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, size, size)`` pictures to ``(batch, classes)`` logits."""
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        logits: Tensor = self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))
        return logits


class Classifier(LightningModule):
    """Any network that maps pictures to logits.

    Args:
        network: The network.
        classes: How many it tells apart.
        lr: Highest learning rate, reached after a tenth of the steps.
    """

    def __init__(self, network: nn.Module, classes: int, lr: float) -> None:
        super().__init__()
        self.network = network
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.lr = lr
        self.trained = 0

    def on_train_start(self) -> None:
        """Count what is trained."""
        self.trained = sum(p.numel() for p in self.parameters() if p.requires_grad)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Mean cross-entropy."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], _: int) -> None:
        """Accuracy over all batches."""
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: the callback narrows it to what is trained."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# The projections of an nn.MultiheadAttention are named as if they were linear layers. Later entries win.
TARGETS: dict[str, dict[str, dict[str, Any]]] = {
    "ViT": {"all-linear": {}, "*.q_proj": {"r": 4, "alpha": 8}, "*.k_proj": {"r": 4, "alpha": 8}, "patches": {"r": 2}},
    "ConvNet": {"conv*": {}, "hidden": {"r": 16, "alpha": 32}},
}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "head": ({"method": "freeze", "optimizer": None}, 1e-2),
    "LoRA": ({"r": 8, "alpha": 16, "quantization": None, "optimizer": None}, 1e-2),
    "QLoRA": ({"r": 8, "alpha": 16}, 1e-2),
    "full": ({"method": "full", "optimizer": None}, 3e-3),
}
"""Arguments of ``LoRACallback``, and the learning rate."""


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("no pictures: pip install scikit-learn, or pass --data") from None
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)


def pictures(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Pictures in colour, from a folder with a folder for each class."""
    import numpy as np
    from PIL import Image

    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    images, labels = [], []
    for label, path in enumerate(classes):
        for file in sorted(path.iterdir()):
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB").resize((size, size)), dtype=np.float32)
            images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
            labels.append(label)
    if len(images) < 10:
        raise SystemExit(f"--data {folder}: expected folders of pictures, one for each class; found {len(images)}")
    return torch.stack(images), torch.tensor(labels)


def trainer(args: argparse.Namespace, epochs: int, *callbacks: Any) -> Trainer:
    """A Trainer that writes no logs and checkpoints."""
    return Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=[*callbacks],
        fast_dev_run=args.fast_dev_run,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder of pictures for each class; default: digits")
    parser.add_argument(
        "--size", type=int, default=32, help="pixels that pictures of --data are brought to (default 32)"
    )
    parser.add_argument("--networks", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="NETWORK")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--epochs", type=int, default=20, help="over the turned pictures; twice as many upright")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch of each, to see that all of it runs")
    return parser.parse_args()


def main() -> None:
    """Pretrain each network on upright pictures, adapt it in every way to turned ones, and print the table."""
    args = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # many runs, each said in one line
    seed_everything(args.seed, verbose=False)
    images, labels = digits() if args.data is None else pictures(args.data, args.size)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    turned = images.rot90(dims=(2, 3))
    half, few = len(images) // 2, len(images) // 6
    upright = DataLoader(TensorDataset(images[:half], labels[:half]), 32, shuffle=True)
    adapt_to = DataLoader(TensorDataset(turned[half : half + few], labels[half : half + few]), 16, shuffle=True)
    held_out = DataLoader(TensorDataset(turned[half + few :], labels[half + few :]), 256)

    classes = int(labels.max()) + 1
    rows = []
    for name in args.networks:
        seed_everything(args.seed, verbose=False)
        network = {"ViT": ViT, "ConvNet": ConvNet}[name](images.shape[1], images.shape[2], classes)
        base = Classifier(network, classes, 3e-3)
        run = trainer(args, 2 * args.epochs)
        run.fit(base, upright)
        [scores] = run.test(base, held_out, verbose=False)
        rows.append((name, "none", "0", f"{100 * scores['accuracy']:.1f}"))
        for method in args.methods:
            arguments, lr = METHODS[method]
            if method in ("LoRA", "QLoRA"):
                arguments = {**arguments, "targets": TARGETS[name]}
            if method != "full":
                arguments = {**arguments, "train": "head"}
            seed_everything(args.seed, verbose=False)
            model = Classifier(copy.deepcopy(network), classes, lr)
            run = trainer(args, args.epochs, LoRACallback(**arguments))
            run.fit(model, adapt_to)
            [scores] = run.test(model, held_out, verbose=False)
            rows.append((name, method, f"{model.trained:,}", f"{100 * scores['accuracy']:.1f}"))
            print(f"{name}, {method}: accuracy {scores['accuracy']:.3f}", flush=True)
    print(f"\n{few} turned pictures to adapt to, {len(images) - half - few} held out")
    print("| network | adapted by | trained parameters | accuracy on turned pictures, % |\n|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
