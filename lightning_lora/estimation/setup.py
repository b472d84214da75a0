"""What is estimated: the settings of a fine-tune that decide how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

METHODS = ("full", "freeze", "lora", "qlora-8bit", "qlora-4bit", "qlora-3bit", "qlora-2bit", "galore", "badam")
OPTIMIZERS = ("paged_adamw_8bit", "adamw", "paged_adamw_32bit")
PRECISIONS = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""Lightning's names; with ``-true`` the whole model is in that dtype, with ``-mixed`` it is computed in it."""

_CHOICES = {"method": METHODS, "optimizer": OPTIMIZERS, "precision": tuple(PRECISIONS), "device": ("cuda", "cpu")}

BLOCKS = "blocks"
"""As ``activation_checkpointing``: the blocks that the model repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The settings of a fine-tune, by the names they have in :class:`lightning_lora.LoRACallback`.

    Args:
        method: ``"full"``; ``"freeze"`` (the modules in ``train``, or the last two blocks); ``"lora"``;
            ``"qlora-8bit"``, ``"qlora-4bit"``, ``"qlora-3bit"``, ``"qlora-2bit"``: LoRA over a base in that many bits;
            ``"galore"``, ``"badam"``: full training whose optimizer is counted by its paper's formula.
        r: Rank of the adapters, or of GaLore's projections.
        targets: What is adapted, and quantized.
        exclude: Patterns of layers to pass over.
        train: Patterns of modules trained whole.
        precision: Of the Trainer; one of ``PRECISIONS``.
        optimizer: ``"paged_adamw_8bit"``, as the callback has it; ``"adamw"``, torch's, with moments in the dtype of
            the parameters; ``"paged_adamw_32bit"``, QLoRA's.
        device: ``"cuda"`` or ``"cpu"``: how the optimizer updates depends on it, and nothing else does.
        activation_checkpointing: None, ``"blocks"`` (those the model repeats), or patterns of modules.
        dequantized_cache: Bytes of weights that stay dequantized; with ``qlora-`` methods alone.

    Raises:
        ValueError: If a value is none of the choices.
    """

    method: str = "qlora-4bit"
    r: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    precision: str = "bf16-true"
    optimizer: str = "paged_adamw_8bit"
    device: str = "cuda"
    activation_checkpointing: str | tuple[str, ...] | None = None
    dequantized_cache: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a whole number of at least 1, got {self.r!r}")
        if self.dequantized_cache and not self.method.startswith("qlora-"):
            raise ValueError(f"dequantized_cache is of no use to method={self.method!r}, which quantizes nothing")

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return PRECISIONS[self.precision]

    @property
    def is_mixed(self) -> bool:
        """Whether it is computed in another dtype than parameters have."""
        return self.precision.endswith("-mixed")
