"""Weight averaging (EMA, SWA) beside LoRA: in which order it works, and where the averages are in a checkpoint.

Both callbacks copy the module in ``setup`` and pair parameters by position. So the adapters have to be there before
the copy is made, and must not be merged before the average has been copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_lora.errors import TargetError, UnsupportedError, listing

_AVERAGERS = (WeightAveraging, StochasticWeightAveraging)


def averagers(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer that average weights."""
    return [callback for callback in trainer.callbacks if isinstance(callback, _AVERAGERS)]  # type: ignore[attr-defined]


def check_averagers(trainer: Trainer, lora: Callback, *, quantized: bool) -> None:
    """Refuse averages that would not be of this fine-tune.

    Raises:
        UnsupportedError: If one comes before ``lora``, or would average packed weights as if they were numbers.
    """
    order: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for averager in averagers(trainer):
        name = type(averager).__name__
        if order.index(averager) < order.index(lora):
            raise UnsupportedError(
                f"{name} copies the module before the adapters are in it. Put LoRACallback first: "
                f"callbacks=[LoRACallback(...), {name}(...)]"
            )
        if quantized and isinstance(averager, WeightAveraging) and averager._use_buffers:
            raise UnsupportedError(
                f"{name} would average the packed codes of the quantized base as if they were numbers. Pass "
                f"{name}(use_buffers=False), or LoRACallback(quantization=None)"
            )


def adapt_early(module: LightningModule) -> None:
    """Let the module be adapted before it is copied: as soon as the callback has wrapped ``configure_model``.

    Raises:
        TargetError: If there is nothing to adapt yet.
    """
    try:
        module.configure_model()
    except TargetError as error:
        raise TargetError(
            f"{error}. (A callback that averages weights copies the module before its setup() is called: build the "
            "layers in __init__ or configure_model)"
        ) from None


def check_norms(trainer: Trainer, module: LightningModule) -> None:
    """Refuse stochastic weight averaging over frozen BatchNorm layers, whose statistics it resets.

    Raises:
        UnsupportedError: Naming them.
    """
    if not any(isinstance(averager, StochasticWeightAveraging) for averager in averagers(trainer)):
        return
    frozen = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and not any(p.requires_grad for key, p in layer.named_parameters() if key != "bias")
    ]
    if frozen:
        raise UnsupportedError(
            f"StochasticWeightAveraging resets the running statistics of {listing(frozen)}, which belong to the frozen "
            "base. Name these layers in train=, or use EMAWeightAveraging"
        )


def set_averages_aside(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Keep a checkpoint's average from being loaded where nothing is averaged.

    StochasticWeightAveraging copies the module in ``setup`` of every stage and loads its average into that copy. Before
    a test the copy is of plain layers, and it is not used.
    """
    for averager in averagers(trainer):
        state = checkpoint.get("callbacks", {}).get(averager.state_key)
        if isinstance(averager, StochasticWeightAveraging) and state and averager._average_model is not None:
            state["average_model_state"] = averager._average_model.state_dict()


def weights_in(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every place of a checkpoint that holds a module's weights, as a dict and the key in it."""
    yield checkpoint, "state_dict"
    if "current_model_state" in checkpoint:  # WeightAveraging has moved them there; the average is in their place
        yield checkpoint, "current_model_state"
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("average_model_state") is not None:  # StochasticWeightAveraging's
            yield state, "average_model_state"
