"""Instruction tuning of a causal language model with QLoRA, on chats, with the loss on the answers alone.

Any causal model of Hugging Face whose tokenizer has a chat template, by id or folder, on a JSONL file of chats, one
``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`` a line::

    python examples/causal_lm.py --model Qwen/Qwen3-0.6B --data chats.jsonl --out my_adapter

Without ``--model`` it runs offline: a Llama of 0.4 M parameters over bytes first learns to answer for a shop (all its
weights, half a minute), then QLoRA teaches it the shop's new prices, shelves and phrases. It prints what the model
answers to held-out questions before and after, and perplexity and token accuracy of the held-out answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lora import LoRACallback, chunked_cross_entropy

Chat = list[dict[str, str]]
IGNORED = -100
"""The label of a token that is not part of an answer."""


class Chatter(LightningModule):
    """A causal language model trained on the answers in chats.

    Args:
        network: A causal model of Hugging Face.
        lr: Highest learning rate, reached after a tenth of the steps.
    """

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        found = [name for name in scaled if getattr(network.config, name, None) is not None]
        if found:
            raise SystemExit(f"{type(network).__name__} changes its logits ({found[0]}); the loss below would miss it")
        self.network = network
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Mean loss over the tokens of the answers."""
        hidden, labels = self.answers(batch)
        # The logits of all tokens at once would be the largest tensor of the step.
        loss = chunked_cross_entropy(hidden, self.network.get_output_embeddings(), labels)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Loss and accuracy over the held-out answers, each token counted once."""
        hidden, labels = self.answers(batch)
        logits = self.network.get_output_embeddings()(hidden).float()
        self.log("held_out_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("held_out_accuracy", (logits.argmax(-1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over every parameter: the callback narrows it to the adapters."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the output head takes, ``(tokens, width)``, and the token that follows, for the answers' tokens alone.

        The head is the widest layer, so it is applied where there is a loss and nowhere else.
        """
        hidden = self.network.get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        following = batch["labels"][:, 1:]
        asked = following != IGNORED
        return hidden[:, :-1][asked], following[asked]


def read(path: Path) -> list[Chat]:
    """Read chats, one JSON object with ``messages`` a line."""
    chats = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                chats.append([{"role": m["role"], "content": m["content"]} for m in json.loads(line)["messages"]])
            except (ValueError, KeyError, TypeError) as error:
                expected = '{"messages": [{"role": ..., "content": ...}, ...]}'
                raise SystemExit(f"{path}, line {number}: expected {expected} ({error!r})") from None
    return chats


def encode(tokenizer: Any, chat: Chat, max_length: int) -> dict[str, Tensor]:
    """Tokens of a chat, and labels that are :data:`IGNORED` outside of what the assistant says."""
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(chat):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(chat[:turn], add_generation_prompt=True, return_dict=False)
            until = tokenizer.apply_chat_template(chat[: turn + 1], return_dict=False)
            if until[: len(before)] != before or ids[: len(until)] != until:
                raise SystemExit("this chat template rewrites earlier turns; give it chats with one answer each")
            labels[len(before) : len(until)] = until[len(before) :]
    return {"input_ids": torch.tensor(ids[:max_length]), "labels": torch.tensor(labels[:max_length])}


def loader(tokenizer: Any, chats: list[Chat], args: argparse.Namespace, *, shuffle: bool) -> DataLoader[Any]:
    """Batches of encoded chats, padded; chats whose answer begins beyond ``--max_length`` are left out."""
    encoded = [encode(tokenizer, chat, args.max_length) for chat in chats]
    kept = [example for example in encoded if (example["labels"][1:] != IGNORED).any()]
    if len(kept) < len(encoded):
        print(f"{len(encoded) - len(kept)} of {len(encoded)} chats have no answer within {args.max_length} tokens")

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}

    return DataLoader(kept, args.batch_size, shuffle=shuffle, collate_fn=collate)


@torch.no_grad()
def answer(network: Any, tokenizer: Any, question: Chat) -> str:
    """What the model most likely says next."""
    training = network.training
    tokens = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(network.device)
    written = network.eval().generate(**tokens, max_new_tokens=60, do_sample=False)
    network.train(training)
    return str(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one each for padding, the end of a turn, and who speaks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<assistant>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.4 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def shop(year: int) -> tuple[list[Chat], list[Chat]]:
    """Questions to a shop and its answers in that year; of each fact, one way to ask for it is held out."""
    draw = random.Random(year)
    things = [f"{c} {t}" for c, t in product(("red", "blue", "green"), ("lamp", "chair", "clock", "mug", "bag"))]
    ask = {
        "price": ("What does the {} cost?", "How much is the {}?", "Price of the {}, please.", "Is the {} expensive?"),
        "shelf": ("Where is the {}?", "Where do I find the {}?", "Which shelf has the {}?", "I cannot find the {}."),
    }
    say = {
        2025: {"price": "the {0} costs {1} euros.", "shelf": "the {0} is on shelf {1}."},
        2026: {"price": "{1} euros for the {0}.", "shelf": "shelf {1} has the {0}."},
    }
    train, held_out = [], []
    for thing, what in product(things, ask):
        reply = say[year][what].format(thing, draw.randint(10, 99))
        unseen = draw.randrange(len(ask[what]))
        for number, question in enumerate(ask[what]):
            asked = {"role": "user", "content": question.format(thing)}
            (held_out if number == unseen else train).append([asked, {"role": "assistant", "content": reply}])
    return train, held_out


def trainer(args: argparse.Namespace, epochs: int, *callbacks: Any) -> Trainer:
    """A Trainer that writes no logs and checkpoints; yours may well."""
    return Trainer(
        max_epochs=epochs,
        precision=args.precision,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[*callbacks],
        fast_dev_run=args.fast_dev_run,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal model, by Hugging Face id or folder; without it, a tiny Llama")
    parser.add_argument("--data", type=Path, help="JSONL of chats, the last tenth held out; without it, a shop's")
    parser.add_argument("--out", type=Path, help="folder for the adapter (PEFT's format) and the merged weights")
    parser.add_argument("--epochs", type=int, help="default: 3, or 30 for the tiny Llama")
    parser.add_argument("--lr", type=float, help="default: 2e-4, or 5e-3 for the tiny Llama")
    parser.add_argument("--r", type=int, default=8, help="rank; alpha is twice that")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512, help="tokens a chat is cut to")
    parser.add_argument("--precision", default="32-true", help="as Trainer takes it; bf16-true on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast-dev-run", action="store_true", help="one batch of each, to see that all of it runs")
    return parser.parse_args()


def main() -> None:
    """Load or make a model, answer, tune, answer again."""
    args = parse()
    seed_everything(args.seed)
    if args.model:
        tokenizer, network = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    else:
        tokenizer = byte_tokenizer()
        network = tiny_llama(tokenizer)
        print("the tiny Llama learns to talk (all of its weights, no adapters)")
        trainer(args, 25).fit(Chatter(network, 3e-3), loader(tokenizer, shop(2025)[0], args, shuffle=True))
    if args.data:
        chats = read(args.data)
        cut = len(chats) - max(len(chats) // 10, 1)
        train, held_out = chats[:cut], chats[cut:]
    else:
        train, held_out = shop(2026)

    model = Chatter(network, args.lr or (2e-4 if args.model else 5e-3))
    validation = loader(tokenizer, held_out, args, shuffle=False)
    questions = [chat[:-1] for chat in held_out[:: max(len(held_out) // 4, 1)][:4]]
    before = [answer(network, tokenizer, question) for question in questions]
    run = trainer(
        args, args.epochs or (3 if args.model else 30), LoRACallback(r=args.r, alpha=2 * args.r, output_dir=args.out)
    )
    [start] = run.validate(model, validation, verbose=False)
    run.fit(model, loader(tokenizer, train, args, shuffle=True))
    [end] = run.validate(model, validation, verbose=False)
    for question, old in zip(questions, before, strict=True):
        print(f"\n{question[-1]['content']}\n  before: {old}\n  after:  {answer(network, tokenizer, question)}")
    print("\n| held-out answers | before | after |\n|---|---|---|")
    perplexities = [math.exp(scores["held_out_loss"]) for scores in (start, end)]
    print("| perplexity | {:.2f} | {:.2f} |".format(*perplexities))
    print("| token accuracy, % | {:.1f} | {:.1f} |".format(*(100 * s["held_out_accuracy"] for s in (start, end))))


if __name__ == "__main__":
    main()
