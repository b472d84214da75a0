"""Direct preference optimization (DPO, arXiv 2305.18290) with one copy of the model in memory.

DPO compares what a model makes of a preferred and a rejected answer with what the model it started from makes of them.
That reference is usually a second copy. With adapters it is the same model within ``disabled(...)``: frozen, and free.
``Preference`` below is a plain LightningModule; for a causal model of Hugging Face, replace ``log_likelihood``.

The model is the byte-level transformer that the package ships. It has read Python's standard library and takes names in
'single' quotes to be likelier than in "double" ones; the pairs prefer those. It prints, on held-out pairs before
and after, how often the preferred answer is the likelier one and has the higher reward, and by what margin; and that
the reference computes what the base did, bit for bit, after training too.
"""

from __future__ import annotations

import argparse
import random
from itertools import product

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, disabled
from lightning_lora.cli.demo.pretrain import load_base

LENGTH = 48


class Preference(LightningModule):
    """Trains a policy towards preferred answers, against the model it started from.

    With rewards ``beta (log p(answer) - log p_ref(answer))`` the loss is ``-log sigmoid(reward(chosen) -
    reward(rejected))``.

    Args:
        network: Maps ``(batch, time)`` tokens to ``(batch, time, vocabulary)`` logits.
        lr: Highest learning rate, reached after a tenth of the steps.
        beta: How dear it is to leave the reference.
    """

    def __init__(self, network: nn.Module, lr: float, beta: float = 0.1) -> None:
        super().__init__()
        self.network = network
        self.lr = lr
        self.beta = beta

    def log_likelihood(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """``(batch,)`` log likelihoods of the tokens where ``asked`` is true: the answer, not the prompt or padding."""
        scores = F.log_softmax(self.network(tokens[:, :-1]).float(), -1)
        chosen = scores.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        return (chosen * asked[:, 1:]).sum(-1)

    def rewards(self, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards of the chosen and of the rejected answers, and the share of pairs where the chosen is likelier.

        It takes one forward pass of the policy and one of the reference.
        """
        chosen, chosen_asked, rejected, rejected_asked = batch
        tokens, asked = torch.cat([chosen, rejected]), torch.cat([chosen_asked, rejected_asked])
        with torch.no_grad(), disabled(self.network):
            reference = self.log_likelihood(tokens, asked)
        policy = self.log_likelihood(tokens, asked)
        likelier = (policy[: len(chosen)] > policy[len(chosen) :]).float().mean()
        reward = self.beta * (policy - reference)
        return reward[: len(chosen)], reward[len(chosen) :], likelier

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The DPO loss."""
        chosen, rejected, _likelier = self.rewards(batch)
        self.log("margin", (chosen - rejected).mean().detach(), prog_bar=True)
        self.log("accuracy", (chosen > rejected).float().mean(), prog_bar=True)
        return -F.logsigmoid(chosen - rejected).mean()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Margin and accuracy of the rewards on held-out pairs, and how often the chosen answer is the likelier one."""
        chosen, rejected, likelier = self.rewards(batch)
        self.log("held_out_likelier", likelier, batch_size=len(chosen))
        self.log("held_out_margin", (chosen - rejected).mean(), batch_size=len(chosen))
        self.log("held_out_accuracy", (chosen > rejected).float().mean(), batch_size=len(chosen))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: the callback narrows it to the adapters."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pairs(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Prompts, each with a string in double quotes (chosen) and in single quotes (rejected); others are held out."""
    draw = random.Random(seed)
    before = ("name = ", "    return ", "        path = ", "if value == ", "    raise ValueError(", "print(", "x.get(")
    words = ("path", "name", "mode", "text", "data", "error", "file", "line", "value", "index", "start", "end", "key")
    made = [(prompt, f"{one}_{other}") for prompt, one, other in product(before, words, words) if one != other]
    draw.shuffle(made)

    def encode(prompt: str, answer: str) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(LENGTH, dtype=torch.long)
        text = torch.tensor(list((prompt + answer).encode()))
        tokens[: len(text)] = text
        asked = torch.zeros(LENGTH)
        asked[len(prompt) : len(text)] = 1
        return tokens, asked

    def dataset(rows: list[tuple[str, str]]) -> TensorDataset:
        encoded = [(*encode(prompt, f'"{word}"'), *encode(prompt, f"'{word}'")) for prompt, word in rows]
        return TensorDataset(*(torch.stack(column) for column in zip(*encoded, strict=True)))

    return dataset(made[:640]), dataset(made[640:840])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--r", type=int, default=8, help="rank; alpha is twice that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch of each, to see that all of it runs")
    return parser.parse_args()


def main() -> None:
    """Train, and say what it did."""
    args = parse()
    seed_everything(args.seed)
    train, held_out = pairs(args.seed)
    validation = DataLoader(held_out, 40)
    network = load_base()
    probe = held_out.tensors[0]
    with torch.no_grad():
        base = network(probe)

    model = Preference(network, args.lr, args.beta)
    # merge=False: the reference is needed after training too. quantization=None: it is the base itself, not its NF4.
    lora = LoRACallback(r=args.r, alpha=2 * args.r, quantization=None, optimizer=None, merge=False)
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[lora],
        fast_dev_run=args.fast_dev_run,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    [before] = trainer.validate(model, validation, verbose=False)
    trainer.fit(model, DataLoader(train, 16, shuffle=True))
    [after] = trainer.validate(model, validation, verbose=False)

    with torch.no_grad():
        adapted = network(probe)
        with disabled(network):
            reference = network(probe)
    print("\n| held-out pairs | before | after |\n|---|---|---|")
    shown = {"likelier": "preferred answer likelier", "accuracy": "its reward higher", "margin": "margin of rewards"}
    for name, meaning in shown.items():
        print(f"| {meaning} | {before[f'held_out_{name}']:.3f} | {after[f'held_out_{name}']:.3f} |")
    print(f"\nreference and base agree bit for bit: {torch.equal(reference, base)}")
    print(f"largest change of a logit by the adapter: {(adapted - base).abs().max():.2f}")


if __name__ == "__main__":
    main()
