"""One base, an adapter for each customer, and batches in which every row goes through its own.

A service reads the messages that shops get and tells what they are about: a refund, a delivery, whether something is in
stock, a complaint. Every shop has words of its own, and the same word means another thing in another shop ("tracking"
is about a parcel in a bookshop, and about a crooked wheel in a bicycle shop). So each shop has an adapter, trained on
its messages alone, over one frozen byte-level transformer that the package ships.

It prints the accuracy of every adapter on every shop's messages; of one routed batch with the messages of all shops
mixed (each row through its shop's adapter), and how far its logits are from each row alone; of two shops' adapters
combined, for a shop that sells both; and the size of it all.
"""

from __future__ import annotations

import argparse
import random
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import (
    LoRAConfig,
    activate,
    adapter_parameters,
    combine,
    disabled,
    inject,
    quantize,
    routed,
    summary,
)
from lightning_lora.cli.demo.pretrain import load_base

INTENTS = ("refund", "delivery", "stock", "complaint")
SHOPS: dict[str, dict[str, list[str]]] = {
    "books": {
        "refund": ["send the novel back", "return a gift", "my money for the atlas"],
        "delivery": ["the tracking of my parcel", "when does the atlas come", "the postman was not here"],
        "stock": ["do you have the second edition", "is the paperback out", "can i reserve the novel"],
        "complaint": ["the spine is broken", "pages are missing", "the cover is torn"],
    },
    "shoes": {
        "refund": ["they pinch, i send them back", "wrong size, money back", "return the boots"],
        "delivery": ["where are my boots", "the box is still at the depot", "which day do the sandals come"],
        "stock": ["do you have size nine", "is the suede one in", "any sandals left"],
        "complaint": ["the sole came off", "a lace is torn", "the heel is broken"],
    },
    "bikes": {
        "refund": ["take the tandem back", "i cancel the frame, pay me back", "return the saddle"],
        "delivery": ["when is the frame shipped", "can i have the tandem brought", "where is my saddle"],
        "stock": ["do you have a spare chain", "is the racer in", "any tubes left"],
        "complaint": ["the tracking is off", "the chain slips", "the brake squeals"],
    },
}
OPENINGS = ("", "hello, ", "hi there: ", "good morning. ", "dear shop, ", "one question: ", "hey! ", "please, ")
ENDINGS = ("", ".", "?", ", thanks", ". best wishes", "! please answer", ", asks anna", ". yours, tom")
LENGTH = 64


class Reader(nn.Module):
    """The byte model's last hidden states, their mean over the message, and a logit for each intent."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = load_base()
        self.bytes.head = nn.Identity()
        self.intent = nn.Linear(self.bytes.config.width, len(INTENTS))

    def forward(self, messages: Tensor) -> Tensor:
        """Map ``(batch, 64)`` bytes, zeros at the end, to ``(batch, 4)`` logits."""
        mask = (messages != 0).unsqueeze(-1)
        logits: Tensor = self.intent((self.bytes(messages) * mask).sum(1) / mask.sum(1))
        return logits


def messages_of(shop: str, draw: random.Random) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A shop's messages as bytes, with intents: to train on, and others with openings and endings put together anew."""
    found: list[tuple[str, int]] = []
    for intent, phrases in SHOPS[shop].items():
        for opening, phrase, ending in product(OPENINGS, phrases, ENDINGS):
            found.append((f"{opening}{phrase}{ending}", INTENTS.index(intent)))
    draw.shuffle(found)

    def encode(rows: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        texts = [list(text.encode()[:LENGTH].ljust(LENGTH, b"\0")) for text, _ in rows]
        return torch.tensor(texts), torch.tensor([intent for _, intent in rows])

    return encode(found[:480]), encode(found[480:])


def train(model: Reader, messages: Tensor, intents: Tensor, steps: int, name: str) -> None:
    """Train whatever adapter is active."""
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        rows = torch.randint(len(messages), (16,))
        loss = F.cross_entropy(model(messages[rows]), intents[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"\r{name}: step {step}/{steps}, loss {loss.item():.3f} ", end="", flush=True)
    print()


@torch.no_grad()
def accuracy(model: Reader, messages: Tensor, intents: Tensor) -> float:
    """Share of the messages whose intent is found, in percent."""
    return 100 * (model(messages).argmax(-1) == intents).float().mean().item()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training for each shop (default 60)")
    parser.add_argument("--r", type=int, default=4, help="rank; alpha is twice that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="two steps each, to see that all of it runs")
    return parser.parse_args()


@torch.no_grad()
def serve(model: Reader, held_out: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Answer the messages of all shops in one batch, and compare with each shop's alone."""
    every = [(shop, *message) for shop, test in held_out.items() for message in zip(*test, strict=True)]
    every = random.Random(0).sample(every, 96)
    customers = [shop for shop, _, _ in every]
    batch, intents = torch.stack([row for _, row, _ in every]), torch.stack([intent for _, _, intent in every])
    with routed(model, customers):
        together = model(batch)

    apart = torch.empty_like(together)
    for shop in SHOPS:
        activate(model, shop, train=())
        rows = torch.tensor([customer == shop for customer in customers])
        apart[rows] = model(batch[rows])
    right = 100 * (together.argmax(-1) == intents).float().mean().item()
    apart_by = (together - apart).abs().max().item()
    print(f"\none routed batch of {len(batch)} messages of all shops: {right:.1f}% right; its logits differ from those")
    print(f"of each shop's messages alone by {apart_by:.1e} at most")


def main() -> None:
    """Train an adapter for each shop, and use them in every way."""
    args = parse()
    torch.manual_seed(args.seed)
    steps = 2 if args.fast_dev_run else args.steps
    draw = random.Random(args.seed)
    data = {shop: messages_of(shop, draw) for shop in SHOPS}
    few = 48 if args.fast_dev_run else None
    held_out = {shop: (rows[:few], intents[:few]) for shop, (_, (rows, intents)) in data.items()}

    model = Reader()
    for shop, (messages, _) in data.items():
        # The head is adapted too, by name: "all-linear" leaves output heads alone. The base is quantized once.
        inject(model, ["all-linear", "intent"], LoRAConfig(r=args.r, alpha=2 * args.r), name=shop)
        quantize(model)
        train(model, *messages, steps, shop)

    print("\naccuracy on the messages of each shop, %\n| adapter | " + " | ".join(SHOPS) + " |")
    print("|---" * (len(SHOPS) + 1) + "|")
    with disabled(model):
        print("| none | " + " | ".join(f"{accuracy(model, *test):.1f}" for test in held_out.values()) + " |")
    for name in SHOPS:
        activate(model, name, train=())
        print(f"| {name} | " + " | ".join(f"{accuracy(model, *test):.1f}" for test in held_out.values()) + " |")
    combine(model, {"books": 1.0, "shoes": 1.0}, name="both", how="cat")
    activate(model, "both", train=())
    print("| books + shoes | " + " | ".join(f"{accuracy(model, *test):.1f}" for test in held_out.values()) + " |")

    serve(model, held_out)
    activate(model, "books")
    base, added = summary(model).base_bytes, 4 * summary(model).trainable
    print(
        f"the base's adapted layers are there once, in {base / 2**10:.0f} KiB; each shop adds {added / 2**10:.0f} KiB"
    )


if __name__ == "__main__":
    main()
