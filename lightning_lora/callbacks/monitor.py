"""``AdapterMonitor``: what the adapters do in a run, to whatever loggers the Trainer has.

It decides *when* to look. What is looked at stands in ``probes``, and is defined in ``metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.callbacks.copying import CopiedAsSet
from lightning_lora.callbacks.probes import PROBES, Probe, Values
from lightning_lora.callbacks.settings import check_choice
from lightning_lora.errors import AdapterError, UnsupportedError
from lightning_lora.metrics.throughput import Where
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.targets import as_patterns

DETAIL = ("model", "layers")


class AdapterMonitor(CopiedAsSet):
    """Logs what the adapters do: how far they have moved the weights, over how many directions, how fast, how costly.

    Every ``every_n_steps`` optimizer steps, and once more at the end of training, these go to every logger of the
    Trainer, at the step that ``self.log`` would use, and into ``trainer.callback_metrics``, where ``ModelCheckpoint``
    and ``EarlyStopping`` find them. It may stand before or after :class:`LoRACallback`.

    - ``lora/update_norm``: ``||ΔW||_F / ||W||_F`` of all adapted layers together, ``ΔW`` of all active adapters.
    - ``lora/effective_rank``, ``lora/stable_rank``: of ``ΔW``, the mean over layers. DoRA, whose ``ΔW`` is not of low
      rank, has none.
    - ``lora/grad_norm/lora_A``, ``.../lora_B`` and so on for each kind of trained tensor: the gradient's length in that
      step, over all layers; after unscaling and reduction, before clipping. A frozen ``A`` has none.
    - ``lora/tokens_per_second``: of all processes, since the last time; loading included, validation not.
    - ``lora/peak_memory_MiB/cuda`` or ``/rss``: see :func:`~lightning_lora.metrics.memory.peak_memory`; of the process
      that needs most.
    - ``lora/memory_MiB/base``, ``adapters``, ``trained``, ``gradients``, ``optimizer``, ``activations``: once, at the
      first step that is logged. ``activations`` is what autograd kept of one batch.

    Args:
        every_n_steps: Optimizer steps between two looks.
        metrics: Which of ``"update"`` (norm and ranks), ``"grad_norm"``, ``"throughput"`` and ``"memory"``.
        detail: ``"model"``, or ``"layers"`` for the update norm and ranks of each layer too, as
            ``lora/update_norm/<layer>``.
        tokens: Where the tokens of a batch are, see :func:`~lightning_lora.metrics.throughput.count_tokens`: a key, a
            position, or None to look for them.

    Raises:
        ValueError: If a value is none of the choices.
    """

    of_a_run: ClassVar[tuple[str, ...]] = ("_probes", "_logged", "_stepped")

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        metrics: str | Iterable[str] = tuple(PROBES),
        detail: str = "model",
        tokens: str | int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be an integer of at least 1, got {every_n_steps!r}")
        self.metrics = as_patterns(metrics, "metrics")
        for name in self.metrics:
            check_choice("metrics", name, PROBES)
        check_choice("detail", detail, DETAIL)
        self.every_n_steps = every_n_steps
        self.detail = detail
        self.tokens: Where = tokens
        self._begin()

    def _begin(self) -> None:
        self._probes: list[Probe] = []
        self._logged: int | None = None
        self._stepped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded models."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UnsupportedError(
                "AdapterMonitor reads whole factors and weights, of which each process of a sharded model holds a "
                "part. Drop it, or use one device or 'ddp'"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, with adapters in place whichever callback came first."""
        if not adapted_layers(pl_module):
            raise AdapterError(
                f"AdapterMonitor finds no adapters in {type(pl_module).__name__}. Add LoRACallback to the Trainer's "
                "callbacks, or inject(model, ...) before"
            )
        self._begin()
        self._probes = [PROBES[name](self, trainer, pl_module) for name in self.metrics]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prepare to look, if this batch ends with a step that is due."""
        if self._logged is None:  # not earlier: in a resumed run Lightning corrects its count after on_train_start
            self._logged = _step(trainer) - 1
        for probe in self._probes:
            probe.before_batch(due=self._is_due(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        for probe in self._probes:
            probe.before_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients, which are whole here: accumulated, reduced and unscaled."""
        self._stepped = True
        if self._is_due(trainer):
            for probe in self._probes:
                probe.before_step(optimizer, _loss_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the batch; after a step that is due, log."""
        for probe in self._probes:
            probe.after_batch(batch)
        if self._stepped and self._is_due(trainer):
            self._log(trainer, _step(trainer))
        self._stepped = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes now is no training."""
        for probe in self._probes:
            probe.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes now is no training."""
        for probe in self._probes:
            probe.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how the adapters ended, unless that has been logged; LoRACallback may have merged them already."""
        last = _step(trainer) - 1  # Lightning has counted it
        if self._logged is not None and last > self._logged:
            self._log(trainer, last)
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the run, which Lightning tears down only after a good end."""
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        self._end()

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether a multiple of ``every_n_steps`` has been reached since the last time."""
        assert self._logged is not None
        return (_step(trainer) + 1) // self.every_n_steps > (self._logged + 1) // self.every_n_steps

    def _log(self, trainer: Trainer, step: int) -> None:
        values: Values = {}
        for probe in self._probes:
            values |= {f"{PREFIX}{name}": value for name, value in probe.values().items()}
        # Not self.log, which would drop what does not fall on a multiple of the Trainer's log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self._logged = step

    def _end(self) -> None:
        for probe in self._probes:
            probe.close()
        self._begin()


PREFIX = "lora/"


def _step(trainer: Trainer) -> int:
    """The step at which ``self.log`` logs now, also with several optimizers; Lightning's own monitors read it so."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What gradients are still multiplied by: an optimizer that unscales by itself (fused AdamW) gets them scaled."""
    precision = trainer.precision_plugin
    scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
    return scaler.get_scale() if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
