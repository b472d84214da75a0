"""No language model: a vision transformer from a config, whose linear layers have biases, adapted in its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peers.workload import DTYPE, Batch, Workload, made_on

PATCH, CLASSES = 16, 100


@dataclass(frozen=True)
class VisionShape:
    """The sizes of the model."""

    width: int
    hidden: int
    layers: int
    heads: int
    image: int


VIT_BASE = VisionShape(768, 3072, 12, 12, 224)
VIT_LARGE = VisionShape(1024, 4096, 24, 16, 224)


@dataclass(frozen=True)
class VisionTransformer(Workload):
    """Classification of ``rows`` random images."""

    targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    loss_tolerance: ClassVar[float] = 2**-6  # computed in bf16 itself, whose steps are 2^-7 of a value at most
    shape: VisionShape
    rows: int

    @property
    def tokens(self) -> int:
        return self.rows * ((self.shape.image // PATCH) ** 2 + 1)

    def build(self, device: torch.device) -> Any:
        shape = self.shape
        config = ViTConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            image_size=shape.image,
            patch_size=PATCH,
            num_labels=CLASSES,
            attn_implementation="sdpa",
        )
        with made_on(device):
            return ViTForImageClassification(config)

    def batch(self, device: torch.device) -> Batch:
        images = torch.randn(self.rows, 3, self.shape.image, self.shape.image, device=device, dtype=DTYPE)
        return {"pixel_values": images, "labels": torch.randint(CLASSES, (self.rows,), device=device)}

    def blocks(self, model: Any) -> Iterable[nn.Module]:
        blocks: Iterable[nn.Module] = model.vit.layers
        return blocks

    def __str__(self) -> str:
        return f"ViT d={self.shape.width}, {self.shape.layers} layers, {self.rows} images"
