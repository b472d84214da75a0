"""Runs of several processes: started by ``torchrun``, each writes what it saw to ``<folder>/<scenario>.<rank>.pt``."""

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_lora import AdapterMonitor, LoRACallback, LoRAConfig, LoRADDPStrategy, LoRAError, inject, quantize
from lightning_lora.metrics import throughput
from lightning_lora.metrics.effective_rank import EffectiveRank
from lightning_lora.metrics.gradient_norm import GradientNorm
from lightning_lora.metrics.spectrum import SingularSpectrum
from lightning_lora.metrics.stable_rank import StableRank
from lightning_lora.metrics.subspace_similarity import SubspaceSimilarity
from lightning_lora.metrics.update_norm import RelativeUpdateNorm
from lightning_lora.model.layers import adapted_layers

STEPS, GLOBAL_BATCH = 20, 8
RANK = int(os.environ.get("RANK", "0"))


class Share(Sampler):
    """Every batch of the one-process run, cut into one part per process."""

    def __init__(self, count: int, rank: int, processes: int) -> None:
        part = GLOBAL_BATCH // processes
        self.indices = [start + rank * part + i for start in range(0, count, GLOBAL_BATCH) for i in range(part)]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def share_loader(rank: int, processes: int) -> DataLoader:
    draw = torch.Generator().manual_seed(5)
    count = STEPS * GLOBAL_BATCH
    data = TensorDataset(torch.randn(count, 64, generator=draw), torch.randn(count, 8, generator=draw))
    return DataLoader(data, batch_size=GLOBAL_BATCH // processes, sampler=Share(count, rank, processes))


def shuffled_loader() -> DataLoader:
    draw = torch.Generator().manual_seed(5)
    return DataLoader(
        TensorDataset(torch.randn(64, 64, generator=draw), torch.randn(64, 8, generator=draw)), 4, shuffle=True
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 96), nn.Tanh(), nn.Linear(96, 8))


class Module(LightningModule):
    """Regression on noise; what it learns does not matter, that all processes learn the same does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.losses: list[float] = []

    def setup(self, stage):
        torch.manual_seed(1)  # of the adapters, which come next; several processes start by resetting the seed

    def training_step(self, batch, _):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test", (self.net(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def predict_step(self, batch, _):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class OwnDropout(Module):
    """Each process draws its own."""

    def setup(self, stage):
        torch.manual_seed(1 + RANK)


class Sharded(Module):
    """Injected, then sharded, in ``configure_model``."""

    storage: str | None = None
    r = 8

    def configure_model(self):
        if adapted_layers(self):
            return
        inject(self, config=LoRAConfig(r=self.r))
        if self.storage is not None:
            quantize(self, hold="parameters")
        self.shard()

    def shard(self):
        from torch.distributed.fsdp import fully_shard

        for layer in (self.net[0], self.net[2], self.net[4]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class ShardedInFourBits(Sharded):
    storage = "nf4"


class ShardedFirst(Sharded):
    def configure_model(self):
        self.shard()


class ShardedOfLowerRank(Sharded):
    r = 2


class ShardedInPart(Sharded):
    def shard(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class Watch(Callback):
    """Keeps the state before it is merged, and counts the bytes of gradients that are exchanged."""

    def __init__(self) -> None:
        self.reduced: list[int] = []

    def on_train_start(self, trainer, pl_module):
        if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
            trainer.model.register_comm_hook(None, self._count)
            self.sent_buffers = sum(b.numel() for b in trainer.model.modules_buffers)

    def _count(self, _, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_train_epoch_end(self, trainer, pl_module):
        trained = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in trained.values())
        self.state = {name: whole(p).clone() for name, p in trained.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trainer(*callbacks, **settings) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def lora(quantization: str | None, **settings) -> LoRACallback:
    return LoRACallback(r=8, quantization=quantization, **settings)


def train_20_steps(
    strategy, processes: int, quantization: str | None, optimizer: str | None, init: str = "kaiming"
) -> dict:
    """20 steps over the same global batches, whatever the number of processes."""
    module, watch = Module(), Watch()
    run = trainer(
        watch,
        lora(quantization, optimizer=optimizer, init=init),
        strategy=strategy,
        devices=processes,
        use_distributed_sampler=False,
    )
    run.fit(module, share_loader(RANK, processes))
    seen = {"state": watch.state, "gradient_bytes": watch.gradient_bytes, "steps": run.global_step}
    if processes > 1:
        seen |= {"reduced": watch.reduced, "sent_buffers": watch.sent_buffers}
    with torch.no_grad():
        seen["merged"] = module.net(torch.ones(1, 64))
        seen["keys"] = list(module.state_dict())
    seen["tested"] = run.test(module, share_loader(RANK, processes), verbose=False)
    return seen


def ddp_of(quantization: str | None, optimizer: str | None, init: str = "kaiming"):
    def scenario(_: Path) -> dict:
        return train_20_steps(DDPStrategy(), 2, quantization, optimizer, init)

    return scenario


class Start(Callback):
    """Keeps the factors ``A`` from before the first step."""

    def on_train_start(self, trainer, pl_module):
        layers = adapted_layers(pl_module)
        self.A = {path: layer.adapter("default").lora_A.detach().clone() for path, layer in layers.items()}


def start_from_data(strategy, processes: int, quantization: str | None) -> dict:
    """Each process has its own half of every batch; one process alone has that of the first."""
    module, watch, start = Module(), Watch(), Start()
    run = trainer(
        watch,
        start,
        lora(quantization, init="eva", eva_batches=10),
        strategy=strategy,
        devices=processes,
        use_distributed_sampler=False,
    )
    run.fit(module, share_loader(RANK, 2))
    return {"start": start.A, "state": watch.state}


def ddp_from_data(_: Path) -> dict:
    return {str(quantization): start_from_data(DDPStrategy(), 2, quantization) for quantization in (None, "nf4")}


def ddp_by_name(_: Path) -> dict:
    module, watch = Module(), Watch()
    run = trainer(watch, strategy=LoRADDPStrategy(r=8, quantization="nf4"), devices=2)
    run.fit(module, share_loader(RANK, 2))
    return {"state": watch.state, "keys": list(module.state_dict())}


def ddp_resumed(folder: Path) -> dict:
    """Two epochs at once, and one and one, with dropout and shuffling; random states differ between processes."""

    def run(name: str, epochs: int, ckpt_path=None) -> tuple[Module, Watch, Trainer]:
        module, watch = OwnDropout(), Watch()
        saver = ModelCheckpoint(folder / name, filename="last", save_top_k=-1)
        made = trainer(
            watch,
            lora("nf4", dropout=0.3),
            saver,
            strategy="ddp",
            devices=2,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        made.fit(module, shuffled_loader(), ckpt_path=ckpt_path)
        return module, watch, made

    straight, straight_watch, _ = run("straight", 2)
    _, _, first = run("first", 1)
    resumed, resumed_watch, _ = run("second", 2, first.checkpoint_callback.best_model_path)
    return {
        "losses": straight.losses[len(straight.losses) // 2 :],
        "resumed": resumed.losses,
        "state": straight_watch.state,
        "resumed_state": resumed_watch.state,
    }


def ddp_of_unequal_bases(_: Path) -> dict:
    module = Module()
    with torch.no_grad():
        module.net[2].weight.add_(RANK)
    return {"error": refused(lambda: trainer(lora("nf4"), strategy="ddp", devices=2).fit(module, shuffled_loader()))}


def ddp_of_unequal_dense_bases(_: Path) -> dict:
    """Without quantization the first process's weights are sent to the others, as ever."""
    module, watch = Module(), Watch()
    with torch.no_grad():
        module.net[2].weight.add_(RANK)
    trainer(watch, lora(None), strategy="ddp", devices=2).fit(module, shuffled_loader())
    return {"merged": module.net[2].weight.detach(), "state": watch.state}


def sharded_strategy(**settings) -> ModelParallelStrategy:
    defaults = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**{**defaults, **settings})


def fsdp_of(kind: type[Sharded]):
    def scenario(folder: Path) -> dict:
        quantization = kind.storage
        module, watch = kind(), Watch()
        made = trainer(
            watch,
            lora(quantization, merge=False, optimizer=None),
            strategy=sharded_strategy(),
            devices=2,
            use_distributed_sampler=False,
        )
        made.fit(module, share_loader(RANK, 2))
        path = folder / f"{kind.__name__}.ckpt"
        made.save_checkpoint(path)
        local = {name: t.to_local().numel() for name, t in module.named_parameters() if hasattr(t, "to_local")}
        full = {name: t.numel() for name, t in module.named_parameters()}
        again, again_watch = kind(), Watch()
        more = trainer(
            again_watch,
            lora(quantization, merge=False, optimizer=None),
            strategy=sharded_strategy(),
            devices=2,
            max_epochs=2,
            use_distributed_sampler=False,
        )
        more.fit(again, share_loader(RANK, 2), ckpt_path=path)
        other = LoRACallback(r=2, quantization=None, merge=False, optimizer=None)
        apart = trainer(other, strategy=sharded_strategy(), devices=2)
        return {
            "of another rank": refused(lambda: apart.fit(ShardedOfLowerRank(), shuffled_loader(), ckpt_path=path)),
            "state": watch.state,
            "local": local,
            "full": full,
            "more_steps": more.global_step,
            "more_state": again_watch.state,
            "losses": module.losses,
            "more_losses": again.losses,
        }

    return scenario


def fsdp_refusals(_: Path) -> dict:
    settings = {"merge": False, "optimizer": None}

    def fit(kind, callback, **strategy):
        run = trainer(callback, strategy=sharded_strategy(**strategy), devices=2)
        return refused(lambda: run.fit(kind(), shuffled_loader()))

    return {
        "after": fit(ShardedFirst, lora(None, **settings)),
        "in part": fit(ShardedInPart, lora(None, **settings)),
        "defaults": fit(Sharded, lora(None), save_distributed_checkpoint=True),
        "from data": fit(ShardedFirst, lora(None, init="eva", **settings)),
    }


class Wide(BoringModel):
    """Lightning's own model, wide enough for blocks of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 2))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class WideSharded(Wide):
    storage: str | None = None

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if adapted_layers(self):
            return
        inject(self, config=LoRAConfig(r=2))
        if self.storage is not None:
            quantize(self, hold="parameters")
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class WideShardedInFourBits(WideSharded):
    storage = "nf4"


def boring(_: Path) -> dict:
    """Every way of several processes, with warnings as errors but for Lightning's own words on loaders and pytrees."""
    steps = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for quantization in (None, "nf4"):
            for name, strategy in (
                ("lora_ddp", LoRADDPStrategy(r=2, alpha=2, quantization=quantization)),
                ("ddp", DDPStrategy()),
            ):
                callbacks = [] if name == "lora_ddp" else [LoRACallback(r=2, alpha=2, quantization=quantization)]
                run = trainer(*callbacks, strategy=strategy, devices=2, limit_train_batches=3, limit_val_batches=2)
                run.fit(Wide())
                steps[f"{name} {quantization}"] = run.global_step
            kind = WideSharded if quantization is None else WideShardedInFourBits
            lora = LoRACallback(r=2, quantization=quantization, merge=False, optimizer=None)
            run = trainer(lora, strategy=sharded_strategy(), devices=2, limit_train_batches=3, limit_val_batches=2)
            run.fit(kind())
            steps[f"fsdp2 {quantization}"] = run.global_step
    return {"steps": steps}


class Rows(Logger):
    """Keeps what it is told, in every process."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows[step] = metrics


def monitor_20_steps(strategy, processes: int, quantization: str | None = None) -> dict[int, dict[str, float]]:
    """What is logged of 20 steps over the same global batches; by its clock each step takes a second, or two in one."""
    rows = Rows()
    run = trainer(
        AdapterMonitor(5, tokens=0),
        lora(quantization, optimizer=None),
        strategy=strategy,
        devices=processes,
        logger=rows,
        use_distributed_sampler=False,
    )
    real, throughput.time = throughput.time, SimpleNamespace(perf_counter=lambda: run.global_step * (1.0 + RANK))
    try:
        run.fit(Module(), share_loader(RANK, processes))
    finally:
        throughput.time = real
    return rows.rows


def monitored(_: Path) -> dict:
    return {str(q): monitor_20_steps(DDPStrategy(), 2, q) for q in (None, "nf4")} | {"metrics": metrics_of_my_share()}


def metrics_of_my_share() -> dict:
    """Each process has updates and a speed of its own; a metric's result is that of both."""
    draw = torch.Generator().manual_seed(3)
    spectra = torch.rand(4, 3, generator=draw, dtype=torch.float64)
    factors = torch.randn(4, 2, 3, 8, generator=draw)
    mine = range(2 * RANK, 2 * RANK + 2) if dist.is_initialized() else range(4)
    made = {
        "effective_rank": (EffectiveRank(), lambda i: (spectra[i],)),
        "stable_rank": (StableRank(), lambda i: (spectra[i],)),
        "spectrum": (SingularSpectrum(3), lambda i: (spectra[i],)),
        "norm": (RelativeUpdateNorm(), lambda i: (spectra[i], spectra[i] + 1)),
        "similarity": (SubspaceSimilarity(3, 3), lambda i: (factors[i, 0], factors[i, 1])),
        "gradient": (GradientNorm(), lambda i: ([spectra[i]],)),
        "throughput": (throughput.Throughput(), lambda i: (100 * (i + 1), 1.0 + RANK)),
    }
    for metric, share in made.values():
        for i in mine:
            metric.update(*share(i))
    return {name: metric.compute() for name, (metric, _) in made.items()}


def refused(act) -> str:
    try:
        act()
    except LoRAError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


SCENARIOS = {
    "ddp_dense": ddp_of(None, None),
    "ddp_nf4": ddp_of("nf4", None),
    "ddp_nf4_8bit": ddp_of("nf4", "paged_adamw_8bit"),
    "ddp_loftq": ddp_of("nf4", None, "loftq"),
    "ddp_from_data": ddp_from_data,
    "ddp_by_name": ddp_by_name,
    "ddp_resumed": ddp_resumed,
    "ddp_of_unequal_bases": ddp_of_unequal_bases,
    "ddp_of_unequal_dense_bases": ddp_of_unequal_dense_bases,
    "fsdp_dense": fsdp_of(Sharded),
    "fsdp_nf4": fsdp_of(ShardedInFourBits),
    "fsdp_refusals": fsdp_refusals,
    "boring": boring,
    "monitored": monitored,
}


def main() -> None:
    warnings.simplefilter("ignore")
    folder, *names = sys.argv[1:]
    for name in names:
        seed_everything(0, verbose=False)
        torch.save(SCENARIOS[name](Path(folder)), Path(folder) / f"{name}.{RANK}.pt")
    dist.destroy_process_group()  # else gloo's threads may outlive the interpreter, which aborts the process


if __name__ == "__main__":
    main()
