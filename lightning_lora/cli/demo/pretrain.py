"""Trains the demo's base model on Python source code.

It is what ``lightning-lora demo --pretrain`` runs and how the shipped weights were made.

The shipped ``base.safetensors`` holds the result in half precision; :data:`BASE_SHA256` is its checksum.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora.cli.demo import corpus
from lightning_lora.cli.demo.model import ByteLM, LanguageModel

BASE_PATH = Path(__file__).with_name("base.safetensors")
BASE_SHA256 = "508e556e2e4900d26d7a45f40fe28f9d7803b501d03045ddc205fa2a0ae1e38c"


def pretrain(path: Path, *, steps: int = 6000) -> None:
    """Train a fresh :class:`ByteLM` on the standard library and write it to ``path`` in half precision.

    Args:
        path: File to write, ``.safetensors``.
        steps: Optimizer steps of 16 windows of 256 bytes; 6000 take about 20 minutes on one core.
    """
    seed_everything(0)
    network = ByteLM()
    windows = corpus.windows(corpus.code().train, network.config.context)
    loader = DataLoader(TensorDataset(windows), batch_size=16, shuffle=True, drop_last=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(network, lr=3e-3), loader)
    save_file({name: weight.half() for name, weight in network.state_dict().items()}, path)


def load_base(path: Path = BASE_PATH) -> ByteLM:
    """Read a base model; the shipped one is checked against :data:`BASE_SHA256`.

    Raises:
        ValueError: If the shipped file is not the one this version was released with.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if path == BASE_PATH and found != BASE_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {BASE_SHA256}. Reinstall lightning-lora, or rebuild it with "
            "--pretrain."
        )
    network = ByteLM()
    network.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return network.to(torch.float32)
