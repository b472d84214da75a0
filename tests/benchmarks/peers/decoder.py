"""A language model: Llama's decoder from a config, adapted on all linear layers of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import chunked_cross_entropy
from peers.workload import Batch, Workload, made_on


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of the model."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocabulary: int


LLAMA_2_7B = DecoderShape(4096, 11008, 32, 32, 32000)


@dataclass(frozen=True)
class Decoder(Workload):
    """Next-token prediction on ``rows`` sequences of ``length`` random tokens."""

    targets: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    loss_tolerance: ClassVar[float] = 2**-8  # the mean, in float32, over the tokens' logits in bf16
    shape: DecoderShape
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def build(self, device: torch.device) -> Any:
        shape = self.shape
        config = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
            use_cache=False,
            attn_implementation="sdpa",
        )
        with made_on(device):
            return LlamaForCausalLM(config)

    def batch(self, device: torch.device) -> Batch:
        ids = torch.randint(self.shape.vocabulary, (self.rows, self.length), device=device)
        return {"input_ids": ids, "labels": ids}

    def blocks(self, model: Any) -> Iterable[nn.Module]:
        blocks: Iterable[nn.Module] = model.model.layers
        return blocks

    def chunked_loss(self, model: Any, batch: Batch) -> Tensor:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        return chunked_cross_entropy(hidden[:, :-1], model.lm_head, batch["labels"][:, 1:])

    def __str__(self) -> str:
        layers = f"{self.shape.layers} layer" + ("s" if self.shape.layers > 1 else "")
        return f"decoder d={self.shape.width}, {layers}, {self.rows}x{self.length} tokens"
