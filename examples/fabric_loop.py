"""QLoRA in a loop of one's own, with Lightning Fabric and no Trainer: the functions behind the callback, one by one.

``inject`` puts adapters in and freezes the rest, ``quantize`` packs the base into 4 bits, ``param_groups`` gives the
optimizer the adapters alone (here with LoRA+: B learns faster than A), ``save_adapter`` writes them in PEFT's format,
``merge`` makes plain layers of it all. The byte-level transformer that the package ships is adapted to English.

It prints the loss on the way; held-out bits per byte before, after, merged, and with the saved adapter loaded onto a
fresh base; and the size of the adapter's file.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_lora import LoRAConfig, inject, load_adapter, merge, param_groups, quantize, save_adapter, summary
from lightning_lora.cli.demo import corpus
from lightning_lora.cli.demo.pretrain import load_base

CONTEXT = 128


def nats(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte."""
    return F.cross_entropy(model(window[:, :-1]).float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """The same in bits, over many windows of one length."""
    losses = [nats(model, part).item() * len(part) for part in windows.split(20)]
    return sum(losses) / len(windows) / math.log(2)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--r", type=int, default=8, help="rank; alpha is twice that")
    parser.add_argument("--lr", type=float, default=2e-3, help="of A; B learns four times as fast")
    parser.add_argument("--precision", default="32-true", help="as Fabric takes it; bf16-mixed on a GPU")
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="two steps, to see that all of it runs")
    return parser.parse_args()


def main() -> None:
    """Adapt, save, merge, load."""
    args = parse()
    steps = 2 if args.fast_dev_run else args.steps
    seed_everything(args.seed)
    fabric = Fabric(accelerator="auto", devices=1, precision=args.precision)
    fabric.launch()
    text = corpus.english()
    windows, held_out = (
        corpus.windows(text.train, CONTEXT),
        corpus.windows(text.held_out, CONTEXT, limit=20 if args.fast_dev_run else 100),
    )
    held_out = held_out.to(fabric.device)
    draws = RandomSampler(windows, replacement=True, num_samples=16 * steps)  # one pass is the whole run
    batches = DataLoader(TensorDataset(windows), 16, sampler=draws)

    network = load_base().to(fabric.device)
    fabric.print(f"base: {bits_per_byte(network, held_out):.3f} bits per byte of held-out English")
    inject(network, config=LoRAConfig(r=args.r, alpha=2 * args.r))
    quantize(network)
    fabric.print(summary(network))

    optimizer = torch.optim.AdamW(param_groups(network, lr=args.lr, lr_ratio=4))
    model, optimizer = fabric.setup(network, optimizer)
    batches = fabric.setup_dataloaders(batches)
    for step, (window,) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = nats(model, window)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            fabric.print(f"step {step}/{steps}: {loss.item() / math.log(2):.3f} bits per byte", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        save_adapter(network, folder)  # the network itself: fabric.setup returned a wrapper around it
        size = (folder / "adapter_model.safetensors").stat().st_size
        after = bits_per_byte(network, held_out)
        again = bits_per_byte(load_adapter(load_base().to(fabric.device), folder), held_out)
    merged = bits_per_byte(merge(network), held_out)
    fabric.print(f"adapted: {after:.3f}, merged: {merged:.3f}, the adapter's {size / 1024:.0f} KiB ", end="")
    fabric.print(f"on a fresh base in full precision: {again:.3f}")


if __name__ == "__main__":
    main()
