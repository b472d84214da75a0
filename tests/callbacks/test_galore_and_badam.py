"""Full training with GaLore and BAdam is the same run with another word."""

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_lora import BAdam, CheckpointError, GaLore, LoRACallback, OptimizerError, UnsupportedError
from lightning_lora.optim.badam import BlockAdamW
from lightning_lora.optim.galore_adamw import GaLoreAdamW
from tests.runs import Module, loader

CHOICES = {"galore_adamw": GaLore(rank=2, update_proj_gap=3), "badam": BAdam(switch_every=3)}
CLASSES = {"galore_adamw": GaLoreAdamW, "badam": BlockAdamW}
EITHER = pytest.mark.parametrize("name", CHOICES)


class Stack(Module):
    """Two equal blocks and a head."""

    def __init__(self) -> None:
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)]
        super().__init__(nn.Sequential(nn.Embedding(16, 6), *[nn.Sequential(*blocks)], nn.Linear(6, 8)))


def fresh() -> Module:
    seed_everything(0, verbose=False)
    return Stack()


@EITHER
def test_it_trains_everything_and_the_loss_falls(trainer, name):
    module, start = fresh(), fresh().state_dict()
    run = trainer(LoRACallback(method="full", optimizer=CHOICES[name]), max_epochs=6)
    run.fit(module, loader())
    assert type(run.optimizers[0]) is CLASSES[name]
    assert all(not torch.equal(tensor, start[key]) for key, tensor in module.state_dict().items())
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    assert all(parameter.requires_grad for parameter in module.parameters())


@EITHER
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_resumes_bit_for_bit(trainer, tmp_path, name, accumulated):
    def lora():
        return LoRACallback(method="full", optimizer=CHOICES[name])

    settings = {"enable_checkpointing": False, "accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    straight = fresh()  # which sets the seed of the shuffle too
    trainer(lora(), max_epochs=4, **settings).fit(straight, loader(shuffle=True))
    first = trainer(lora(), max_epochs=2, **settings)
    first.fit(fresh(), loader(shuffle=True))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh()
    trainer(lora(), max_epochs=4, **settings).fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert straight.losses[-4:] == resumed.losses[-4:]


def test_a_checkpoint_of_another_optimizer_is_refused(trainer, tmp_path):
    first, path = trainer(LoRACallback(method="full", optimizer="badam"), max_epochs=1), tmp_path / "kept.ckpt"
    first.fit(fresh(), loader())
    first.save_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"holds the state of .*BlockAdamW, this run uses .*GaLoreAdamW"):
        trainer(LoRACallback(method="full", optimizer="galore_adamw")).fit(fresh(), loader(), ckpt_path=path)
    with pytest.raises(OptimizerError, match=r"this one has \{'switch_every': 9"):
        trainer(LoRACallback(method="full", optimizer=BAdam(switch_every=9))).fit(fresh(), loader(), ckpt_path=path)


def test_yaml_names_them_with_their_values():
    made = LoRACallback(method="full", optimizer={"name": "badam", "switch_every": 7, "order": "ascending"})
    assert made.swap == BAdam(switch_every=7, order="ascending")
    assert LoRACallback(method="full", optimizer="galore_adamw").swap == GaLore()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"optimizer": "galore_adamw"}, "optimizer='galore_adamw' saves memory where whole matrices are trained"),
        ({"optimizer": BAdam(), "method": "freeze", "train": "net"}, "method='freeze' does not. Use method='full'"),
        ({"optimizer": "adam"}, "optimizer must be one of paged_adamw_8bit, galore_adamw, badam, got 'adam'"),
        ({"optimizer": {"name": "badam", "every": 3}, "method": "full"}, "'badam' has no every; its fields are switch"),
        ({"optimizer": {"rank": 3}, "method": "full"}, "optimizer must be one of .*, got None"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        LoRACallback(**arguments)


def test_another_optimizer_than_adam_is_refused(trainer):
    class Descends(Stack):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(OptimizerError, match=r"takes the place of torch.optim.Adam and AdamW.* returns SGD"):
        trainer(LoRACallback(method="full", optimizer="badam")).fit(Descends(), loader())


def test_blocks_by_turns_are_refused_where_processes_wait_for_all_gradients(trainer):
    run = trainer(LoRACallback(method="full", optimizer="badam"), strategy=DDPStrategy(process_group_backend="gloo"))
    with pytest.raises(UnsupportedError, match="DDPStrategy expects a gradient of every parameter"):
        run.callbacks[0].setup(run, LightningModule(), "fit")
