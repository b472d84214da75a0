"""What is estimated: the settings of a fine-tune that decide how much memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.optim.badam import BAdam
from lightning_lora.optim.galore_adamw import GaLore
from lightning_lora.quantization.config import (
    Int8Config,
    NF2Config,
    NF3Config,
    NF4Config,
    QuantizationConfig,
)
from lightning_lora.quantization.edges import check_embeddings

METHODS = ("full", "freeze", "lora", "qlora-8bit", "qlora-4bit", "qlora-3bit", "qlora-2bit", "galore", "badam")
STORAGES: dict[str, QuantizationConfig] = {
    "qlora-8bit": Int8Config(),
    "qlora-4bit": NF4Config(),
    "qlora-3bit": NF3Config(),
    "qlora-2bit": NF2Config(),
}
"""What these methods store the base in, unless ``quantization`` says something else."""
OPTIMIZERS = ("paged_adamw_8bit", "adamw", "paged_adamw_32bit")
PRECISIONS = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""Lightning's names; with ``-mixed`` it is computed in that dtype, with ``-true`` the whole model is in it but for the
adapters. As in Lightning, ``32-true`` leaves a model as it is."""

_CHOICES = {"method": METHODS, "precision": tuple(PRECISIONS), "device": ("cuda", "cpu")}

BLOCKS = "blocks"
"""As ``activation_checkpointing``: the blocks that the model repeats."""

Targets = str | tuple[str, ...] | Mapping[str, AdapterConfig]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The settings of a fine-tune, by the names they have in :class:`lightning_lora.LoRACallback`.

    Args:
        method: ``"full"``; ``"freeze"`` (the modules in ``train``, or the last two blocks); ``"lora"``: adapters;
            ``"qlora-8bit"``, ``"qlora-4bit"``, ``"qlora-3bit"``, ``"qlora-2bit"``: adapters over a base in that many
            bits; ``"galore"``, ``"badam"``: full training with these optimizers.
        r: Rank of the adapters, or of GaLore's projections.
        config: What adapters are, :class:`~lightning_lora.DoRAConfig` for instance; None is LoRA of rank ``r``.
        targets: What is adapted, and quantized.
        exclude: Patterns of layers to pass over.
        train: Patterns of modules trained whole.
        train_bias: Biases to train: ``"none"``, ``"adapted"`` or ``"all"``.
        quantization: How the base under adapters is stored; None is as the method says.
        embeddings: ``"int8"`` for embeddings and output heads in 8 bit beside it; None leaves them.
        precision: Of the Trainer; one of ``PRECISIONS``.
        optimizer: ``"paged_adamw_8bit"``, as the callback has it; ``"adamw"``, torch's, with moments in the dtype of
            the parameters; ``"paged_adamw_32bit"``, QLoRA's; or a :class:`~lightning_lora.GaLore` or
            :class:`~lightning_lora.BAdam`.
        device: ``"cuda"`` or ``"cpu"``: how the optimizer updates, and what can be quantized, depends on it.
        activation_checkpointing: None, ``"blocks"`` (those the model repeats), or patterns of modules.
        dequantized_cache: Bytes of weights that stay dequantized; with ``qlora-`` methods alone.

    Raises:
        ValueError: If a value is none of the choices, or of no use for the method.
    """

    method: str = "qlora-4bit"
    r: int = 16
    config: AdapterConfig | None = None
    targets: Targets = field(default="all-linear", hash=False)
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    train_bias: str = "none"
    quantization: QuantizationConfig | None = None
    embeddings: str | None = None
    precision: str = "bf16-true"
    optimizer: str | GaLore | BAdam = "paged_adamw_8bit"
    device: str = "cuda"
    activation_checkpointing: str | tuple[str, ...] | None = None
    dequantized_cache: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or GaLore(...) or BAdam(...), got "
                f"{self.optimizer!r}"
            )
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, got {self.r!r}")
        if self.quantization is not None and not self.has_adapters:
            raise ValueError(f"method={self.method!r} quantizes nothing; drop quantization={self.quantization!r}")
        if self.method != "full" and not isinstance(self.optimizer, str):
            raise ValueError(f"optimizer={self.optimizer!r} is for method='full', and this is {self.method!r}")
        check_embeddings(self.embeddings)
        if self.embeddings is not None and self.storage is None:
            raise ValueError(f"embeddings={self.embeddings!r} stands beside a quantized base, and {self._no_base}")
        if isinstance(self.dequantized_cache, bool) or not isinstance(self.dequantized_cache, int):
            raise ValueError(f"dequantized_cache must be a whole number of bytes, got {self.dequantized_cache!r}")
        if self.dequantized_cache and self.storage is None:
            raise ValueError(f"dequantized_cache is of no use: {self._no_base}")

    @property
    def _no_base(self) -> str:
        return f"method={self.method!r} quantizes nothing; drop it"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return PRECISIONS[self.precision]

    @property
    def is_mixed(self) -> bool:
        """Whether it is computed in another dtype than parameters have."""
        return self.precision.endswith("-mixed")

    @property
    def casts(self) -> bool:
        """Whether the model is cast, whatever it was made in."""
        return not self.is_mixed and self.precision != "32-true"

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained."""
        return self.method == "lora" or self.method in STORAGES

    @property
    def storage(self) -> QuantizationConfig | None:
        """How the base under the adapters is stored; None is as it comes."""
        return self.quantization or STORAGES.get(self.method)

    @property
    def adapters(self) -> AdapterConfig:
        """What adapters are where targets do not say."""
        return self.config or LoRAConfig(r=self.r)

    @property
    def update_rule(self) -> str | GaLore | BAdam:
        """The optimizer, that of a method which is named after its optimizer included."""
        named: dict[str, GaLore | BAdam] = {"galore": GaLore(rank=self.r), "badam": BAdam()}
        return named.get(self.method, self.optimizer)


@runtime_checkable
class HasSetup(Protocol):
    """Something that a fine-tune is set up with, such as :class:`lightning_lora.LoRACallback`."""

    def as_setup(self) -> Setup:
        """Return what decides how much memory it takes."""
