"""How a hollow model is set up for each method, and what the optimizer keeps for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_lora.errors import QuantizationError, TargetError, listing
from lightning_lora.estimation.optimizers import COUNTERS
from lightning_lora.estimation.setup import Setup
from lightning_lora.estimation.storage import STORAGES, Sized, Storage
from lightning_lora.model.blocks import repeated_blocks
from lightning_lora.model.dequantized import keep_dequantized
from lightning_lora.model.inject import inject
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.targets import resolve, resolve_train
from lightning_lora.nn.lora import LoRAConfig


class Method(ABC):
    """One way to fine-tune."""

    by_formula: ClassVar[str | None] = None
    """Where the optimizer's part comes from, if it is a formula and nothing of this package's."""

    @abstractmethod
    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Make ``model`` what is trained, in place.

        Returns:
            What has to be known of it: layers that stay as they are.
        """

    def state_bytes(self, trained: Mapping[str, Tensor], setup: Setup) -> int:
        """What the optimizer keeps, given the trained parameters by name."""
        return COUNTERS[setup.optimizer](list(trained.values()))


@dataclass(frozen=True)
class Full(Method):
    """Everything is trained."""

    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Let every parameter of floating point require a gradient."""
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return []


@dataclass(frozen=True)
class Freeze(Method):
    """Some modules are trained whole, the others not."""

    last: ClassVar[int] = 2
    """Blocks that are trained where no module is named."""

    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Freeze all but what ``train`` names, or the last blocks."""
        names = resolve_train(model, setup.train) or tuple(_blocks(model, "freeze"))[-self.last :]
        model.requires_grad_(False)
        for name in names:
            model.get_submodule(name).requires_grad_(True)
        return [f"trained: {listing(names)}"]


@dataclass(frozen=True)
class LoRA(Method):
    """Adapters over a frozen base.

    Attributes:
        storage: Of the base under the adapters; None leaves it as it is.
    """

    storage: Storage | None = None

    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Inject, and put layers of the storage's size under the adapters."""
        config = LoRAConfig(r=setup.r)
        left = resolve(model, setup.targets, config, exclude=setup.exclude, train=setup.train).left
        inject(model, setup.targets, config, exclude=setup.exclude, train=setup.train)
        notes = [f"left as they are: {listing(f'{name} ({why})' for name, why in left.items())}"] if left else []
        if self.storage is None:
            return notes
        return notes + self._quantize(model, self.storage, setup)

    @staticmethod
    def _quantize(model: nn.Module, storage: Storage, setup: Setup) -> list[str]:
        layers = adapted_layers(model)
        dense = {name: layer for name, layer in layers.items() if isinstance(layer.base_layer, nn.Linear)}
        kept = [name for name in layers if name not in dense]
        if not dense:
            raise QuantizationError(
                f"none of the {len(layers)} adapted layers can be held in few bits ({listing(kept)} is no nn.Linear). "
                "Use method='lora'"
            )
        for layer in dense.values():
            assert isinstance(layer.base_layer, nn.Linear)
            layer.base_layer = Sized(layer.base_layer, storage)
        keep_dequantized(model, setup.dequantized_cache)
        return [f"adapted and not quantized: {listing(kept)}"] if kept else []


@dataclass(frozen=True)
class GaLore(Method):
    """Full training with gradients projected to rank ``R`` (Zhao et al., arXiv 2403.03507, table 1).

    A matrix ``(M, N)`` with ``M <= N`` keeps a projector of ``M R`` and two moments of ``R N`` elements; whatever is no
    matrix, or not above that rank, keeps two moments. All gradients are there, as without updates layer by layer.
    """

    by_formula = "GaLore, arXiv 2403.03507, table 1"

    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Train everything."""
        return Full().prepare(model, setup)

    def state_bytes(self, trained: Mapping[str, Tensor], setup: Setup) -> int:
        """``M R + 2 R N`` elements of the parameter's dtype for each matrix."""
        return sum(self._elements(p, setup.r) * p.element_size() for p in trained.values())

    @staticmethod
    def _elements(parameter: Tensor, r: int) -> int:
        if parameter.dim() != 2 or min(parameter.shape) <= r:
            return 2 * parameter.numel()
        less, more = sorted(parameter.shape)
        return less * r + 2 * r * more


@dataclass(frozen=True)
class BAdam(Method):
    """Full training of one block at a time (Luo et al., arXiv 2404.02827): ``2 M + 16 M / D`` bytes.

    For the block that is trained: a ``float32`` copy, gradient and two moments. It is the first one here, whose
    gradient passes through all the others.
    """

    by_formula = "BAdam, arXiv 2404.02827: 16 bytes per parameter of one block"

    def prepare(self, model: nn.Module, setup: Setup) -> list[str]:
        """Freeze all but the first block."""
        name, block = next(iter(_blocks(model, "badam").items()))
        model.requires_grad_(False)
        block.requires_grad_(True)
        return [f"trained at a time: one block, such as {name}"]

    def state_bytes(self, trained: Mapping[str, Tensor], setup: Setup) -> int:
        """16 bytes for each parameter, less the gradient that is counted as one."""
        return sum((16 - p.element_size()) * p.numel() for p in trained.values())


def method_of(setup: Setup) -> Method:
    """Return what a setup's method stands for."""
    if setup.method.startswith("qlora-"):
        return LoRA(STORAGES[int(setup.method.removeprefix("qlora-").removesuffix("bit"))])
    return {"full": Full(), "freeze": Freeze(), "lora": LoRA(), "galore": GaLore(), "badam": BAdam()}[setup.method]


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _blocks(model: nn.Module, method: str) -> dict[str, nn.Module]:
    blocks = repeated_blocks(model)
    if not blocks:
        raise TargetError(
            f"method={method!r} looks for the blocks a model repeats, and {type(model).__name__} has no list of equal "
            "modules. Name what is trained: method='freeze', train=(...)"
        )
    return blocks
