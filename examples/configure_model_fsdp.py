"""QLoRA sharded over two processes with FSDP2, on the CPU: the model is built, adapted and sharded in one hook.

Lightning's ``ModelParallelStrategy`` shards in ``configure_model``, so the adapters have to be there before, and the
callback, set to the same values, takes them over. Every process holds a part of each packed layer; checkpoints hold the
adapters alone, whole, in one small file that a single process reads and merges. Two GPUs: ``--accelerator gpu``.

The byte-level transformer that the package ships is adapted to English. It prints held-out bits per byte of the base,
of the sharded model, and of what one process makes of the checkpoint.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, inject, load_from_checkpoint, merge, quantize
from lightning_lora.cli.demo import corpus
from lightning_lora.cli.demo.pretrain import load_base

CONTEXT = 128
LORA = {"r": 8, "alpha": 16.0}


class Sharded(LightningModule):
    """A language model of bytes, adapted and sharded as soon as it is built.

    Args:
        lr: Learning rate.
    """

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.network: nn.Module | None = None
        self.lr = lr

    def configure_model(self) -> None:
        """Build, adapt, quantize, shard. Lightning calls this at the start of every stage."""
        if self.network is not None:
            return
        self.network = load_base()
        if self.device_mesh is None:  # one process, reading the checkpoint: its adapters are put in for it
            return
        inject(self, config=LoRAConfig(**LORA))
        quantize(self, hold="parameters")  # FSDP2 shards parameters, not buffers
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Mean loss of the next byte."""
        loss = self._nats(batch[0])
        self.log("bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Bits per byte of held-out text, over all processes."""
        self.log("held_out", self._nats(batch[0]) / math.log(2), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the adapters: under FSDP2 the optimizer is left as it is, so it names what is trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)

    def _nats(self, window: Tensor) -> Tensor:
        assert self.network is not None
        return F.cross_entropy(self.network(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="two steps, to see that all of it runs")
    return parser.parse_args()


def main() -> None:
    """Train in all processes; then read the checkpoint in the first."""
    args = parse()
    seed_everything(args.seed)
    text = corpus.english()
    train = DataLoader(TensorDataset(corpus.windows(text.train, CONTEXT)), 8, shuffle=True, drop_last=True)
    held_out = DataLoader(
        TensorDataset(corpus.windows(text.held_out, CONTEXT, limit=20 if args.fast_dev_run else 80)), 20
    )
    strategy = ModelParallelStrategy(
        data_parallel_size=args.processes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo" if args.accelerator == "cpu" else None,
    )
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.processes,
        strategy=strategy,
        max_steps=2 if args.fast_dev_run else args.steps,
        callbacks=[LoRACallback(**LORA, merge=False, optimizer=None)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Sharded()
    [before] = trainer.validate(model, held_out, verbose=False)
    trainer.fit(model, train)
    [after] = trainer.validate(model, held_out, verbose=False)
    folder = strategy.broadcast(tempfile.mkdtemp())
    path = Path(folder) / "adapters.ckpt"
    trainer.save_checkpoint(path)  # all processes take part; the first one writes
    if not trainer.is_global_zero:
        return

    alone = merge(load_from_checkpoint(Sharded, path))
    with torch.no_grad():
        nats = [alone._nats(window) for (window,) in held_out]
    merged = sum(loss.item() for loss in nats) / len(nats) / math.log(2)
    print(f"\nheld-out bits per byte: base {before['held_out']:.3f}, sharded {after['held_out']:.3f}, ", end="")
    print(f"merged by one process {merged:.3f}; checkpoint {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
