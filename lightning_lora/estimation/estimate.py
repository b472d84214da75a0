"""How much memory a fine-tune takes, told before it runs and without its weights.

The model is set up as the callback would, without values, and one step of it is made: what is counted is what its own
forward and backward pass allocate, whatever the model. What the optimizer keeps is counted from shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lora.errors import AdapterError
from lightning_lora.estimation.hollow import hollow_batch, hollow_model
from lightning_lora.estimation.methods import prepare, trained_at_once, trained_parameters
from lightning_lora.estimation.optimizers import state_bytes, step_workspace
from lightning_lora.estimation.replay import Step, default_step, held, recompute, replay
from lightning_lora.estimation.setup import HasSetup, Setup
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
        setup = {field.name: _plain(getattr(self.setup, field.name)) for field in fields(self.setup)}
        return {
            "setup": setup,
            "parts": dict(self.parts),
            "parameters": self.parameters,
            "trainable": self.trainable,
            "notes": list(self.notes),
            "total": self.total,
        }

    def __str__(self) -> str:
        rows = [*self.parts.items(), ("total", self.total)]
        lines = [f"{name:<12} {size / 2**20:>12,.1f} MiB" for name, size in rows]
        head = f"{self.setup.method}: {self.trainable:,} parameters trained over {self.parameters:,}"
        return "\n".join([head, *lines, *self.notes])


def estimate(
    model: nn.Module,
    batch: Any,
    setup: Setup | HasSetup = _DEFAULT,
    *,
    step: Step = default_step,
    shared: Sequence[object] = (),
) -> Estimate:
    """Tell how much memory fine-tuning ``model`` takes, from shapes alone.

    Counted are PyTorch's tensors. What a CUDA context takes (some 0.5 GB), what its allocator loses between tensors,
    and what a kernel takes and gives back by itself are not.

    Args:
        model: Any module, on any device; on the meta device it needs no memory. It stays as it is.
        batch: What ``step`` takes, of which only shapes and dtypes are read; tensors may be on the meta device.
        setup: How it is fine-tuned: a :class:`Setup`, or a :class:`lightning_lora.LoRACallback`.
        step: From model and batch to the loss; as it stands ``training_step(batch, 0)``, ``model(**batch).loss`` or
            ``model(batch)``.
        shared: What of the model is not to be copied, such as a Trainer.

    Raises:
        AdapterError: If the model holds adapters.
        QuantizationError: If none of its layers can be stored as the setup says.
        TargetError: If a pattern does not fit the model.
        TypeError: If there is no loss.
        UnsupportedError: If the forward pass decides by numbers in tensors.
    """
    setup = setup if isinstance(setup, Setup) else setup.as_setup()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow, notes = _prepared(model, setup, shared)
        recompute(hollow, setup.activation_checkpointing)
        trained = trained_parameters(hollow)
        turns = trained_at_once(hollow, setup)
        found = [_step(hollow, hollow_batch(batch), step, setup, turn) for turn in turns]
    most = max(found, key=lambda parts: sum(parts.values()))
    if len(turns) > 1:
        notes = [*notes, f"trained at a time: {max(map(_size, turns)):,} parameters at most"]
    return Estimate(setup, most, _size(model.parameters()), _size(trained.values()), tuple(notes))


def standing(model: nn.Module, setup: Setup | HasSetup = _DEFAULT) -> dict[str, int]:
    """Return the bytes of what stays from step to step, whatever the batch: weights, adapters, optimizer.

    Args:
        model: As for :func:`estimate`.
        setup: How it is fine-tuned.

    Raises:
        AdapterError: If the model holds adapters.
        TargetError: If a pattern does not fit the model.
    """
    setup = setup if isinstance(setup, Setup) else setup.as_setup()
    with FakeTensorMode(allow_non_fake_inputs=True):
        hollow, _ = _prepared(model, setup, ())
        state = max(state_bytes(setup.update_rule, turn) for turn in trained_at_once(hollow, setup))
        return held(hollow) | {"optimizer": state}


def _prepared(model: nn.Module, setup: Setup, shared: Sequence[object]) -> tuple[nn.Module, list[str]]:
    """A hollow model as it is trained, and what has to be known of it."""
    if adapted_layers(model):
        raise AdapterError("the model holds adapters already; estimate the model they were put into, or merge(it)")
    hollow = hollow_model(model, shared=shared).train()
    notes = prepare(hollow, setup)
    if setup.casts:  # with the -true precisions; adapters stay in float32
        hollow = hollow_model(hollow, setup.dtype, shared=shared)
    return hollow, notes


def _step(model: nn.Module, batch: Any, step: Step, setup: Setup, turn: Sequence[nn.Parameter]) -> dict[str, int]:
    """The parts at the peak of a step that trains these parameters."""
    ids = {id(parameter) for parameter in turn}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in ids)
    workspace = step_workspace(setup.update_rule, turn, setup.device)
    parts = replay(model, batch, step, setup, state_bytes(setup.update_rule, turn), workspace)
    for parameter, trained in before.items():
        parameter.requires_grad_(trained)
    return parts


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _plain(value: Any) -> Any:
    """A value of a setup for JSON: configs as their representation."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value if value is None or isinstance(value, str | int | tuple) else repr(value)
