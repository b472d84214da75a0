"""How much memory a fine-tune takes, told before it runs and without its weights.

The model is set up as the callback would, without values, and one step of it is made: what is counted is what its own
forward and backward pass allocate, whatever the model. What the optimizer keeps is counted from shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lora.errors import AdapterError
from lightning_lora.estimation.hollow import hollow_batch, hollow_model
from lightning_lora.estimation.methods import method_of, trained_parameters
from lightning_lora.estimation.optimizers import step_workspace
from lightning_lora.estimation.replay import Step, default_step, held, recompute, replay
from lightning_lora.estimation.setup import Setup
from lightning_lora.model.layers import adapted_layers

_DEFAULT = Setup()


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` returns; ``print`` it.

    Attributes:
        setup: What was estimated.
        parts: Bytes by part, in order, at the moment of the step when they are the most in all.
        parameters: Of the model, without adapters.
        trainable: Parameters that are trained.
        notes: What has to be known to read it.
    """

    setup: Setup
    parts: Mapping[str, int]
    parameters: int
    trainable: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "parts": dict(self.parts), "notes": list(self.notes), "total": self.total}

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("total", self.total)]
        lines = [f"{name:<12} {size / 2**20:>12,.1f} MiB" for name, size in rows]
        head = f"{self.setup.method}: {self.trainable:,} parameters trained over {self.parameters:,}"
        return "\n".join([head, *lines, *self.notes])


def estimate(model: nn.Module, batch: Any, setup: Setup = _DEFAULT, *, step: Step = default_step) -> Estimate:
    """Tell how much memory fine-tuning ``model`` takes, from shapes alone.

    Counted are PyTorch's tensors. What a CUDA context takes (some 0.5 GB), what its allocator loses between tensors,
    and what a kernel takes and gives back by itself are not.

    Args:
        model: Any module, on any device; on the meta device it needs no memory. It stays as it is.
        batch: What ``step`` takes, of which only shapes and dtypes are read; tensors may be on the meta device.
        setup: How it is fine-tuned.
        step: From model and batch to the loss; as it stands ``training_step(batch, 0)``, ``model(**batch).loss`` or
            ``model(batch)``.

    Raises:
        AdapterError: If the model holds adapters.
        TargetError: If a pattern does not fit the model.
        TypeError: If there is no loss.
        UnsupportedError: If the forward pass decides by numbers in tensors.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow, notes = _prepared(model, setup)
        recompute(hollow, setup.activation_checkpointing)
        trained = trained_parameters(hollow)
        state, workspace = _optimizer(trained, setup)
        parts = replay(hollow, hollow_batch(batch), step, setup, state, workspace)
    return Estimate(setup, parts, _count(model), sum(p.numel() for p in trained.values()), (*notes, *_formula(setup)))


def standing(model: nn.Module, setup: Setup = _DEFAULT) -> dict[str, int]:
    """Return the bytes of what stays from step to step, whatever the batch: weights, adapters, optimizer.

    Args:
        model: As for :func:`estimate`.
        setup: How it is fine-tuned.

    Raises:
        AdapterError: If the model holds adapters.
        TargetError: If a pattern does not fit the model.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow, _ = _prepared(model, setup)
        return held(hollow) | {"optimizer": _optimizer(trained_parameters(hollow), setup)[0]}


def _prepared(model: nn.Module, setup: Setup) -> tuple[nn.Module, list[str]]:
    """A hollow model as it is trained, and what has to be known of it."""
    if adapted_layers(model):
        raise AdapterError("the model holds adapters already; estimate the model they were put into, or merge(it)")
    hollow = hollow_model(model, None).train()
    notes = method_of(setup).prepare(hollow, setup)
    # Adapters are made in float32, and with the -true precisions cast together with the model.
    return (hollow if setup.is_mixed else hollow_model(hollow, setup.dtype)), notes


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _optimizer(trained: Mapping[str, Tensor], setup: Setup) -> tuple[int, int]:
    """Bytes that an optimizer keeps, and that an update needs."""
    method = method_of(setup)
    workspace = 0 if method.by_formula else step_workspace(setup.optimizer, trained.values(), setup.device)
    return method.state_bytes(trained, setup), workspace


def _formula(setup: Setup) -> tuple[str, ...]:
    source = method_of(setup).by_formula
    return (f"optimizer: by formula ({source}), not measured",) if source else ()
