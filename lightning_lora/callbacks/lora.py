"""``LoRACallback``: one callback turns a LightningModule into a LoRA or QLoRA fine-tune.

It decides *when* things happen in a run; *how* they happen is in ``model``, ``quantization``, ``optim`` and ``io``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.callbacks.compat import check_trainer
from lightning_lora.callbacks.finetune import FineTune, check_optimizers
from lightning_lora.callbacks.gradients import check_gradients, check_loss
from lightning_lora.callbacks.rng import random_state, set_random_state
from lightning_lora.callbacks.settings import METHODS, OPTIMIZERS, as_quantization, as_tuple, check_choice, with_configs
from lightning_lora.callbacks.wraps import wrap
from lightning_lora.errors import AdapterError, TargetError, listing
from lightning_lora.io.adapter_folder import load_adapter, save_adapter
from lightning_lora.io.description import describe_loras, differences
from lightning_lora.io.keys import canonical
from lightning_lora.io.merged import save_merged
from lightning_lora.model.inject import apply
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.merge import is_finite
from lightning_lora.model.parameters import trained_modules
from lightning_lora.model.summary import summary
from lightning_lora.model.targets import ALL_LINEAR, Plan, resolve
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.optim.report import optimizer_report
from lightning_lora.optim.rewrite import rewrite_optimizers
from lightning_lora.quantization.config import NF4Config
from lightning_lora.quantization.quantize import check_quantizable, quantize

_FINETUNES: WeakKeyDictionary[nn.Module, FineTune] = WeakKeyDictionary()
"""The fine-tune of each module, whichever callback made it: nothing is to be injected or merged twice."""


class LoRACallback(Callback):
    """Fine-tunes a LightningModule with LoRA, over a base in 4 bits unless told otherwise.

    When the model stands (after ``__init__``, ``setup`` and ``configure_model``), adapters are put into its linear
    layers, everything else is frozen, and the frozen layers under the adapters are quantized. ``torch.optim.Adam`` and
    ``AdamW`` become bitsandbytes' paged 8-bit AdamW over the adapters alone, with their schedulers kept. Checkpoints
    hold the adapters alone and resume bit for bit at an epoch boundary. After training the adapters are merged: the
    module then holds plain layers with its original keys, whose parameters stay frozen until ``requires_grad_(True)``.

    Args:
        targets: Layers to adapt: ``"all-linear"`` (all but the output head), a name or glob or several, or a mapping
            from name or glob to a config, or to a dict of the fields that differ from those below, e.g. ``{"*.q_proj":
            {"r": 8}}``.
        r: Rank of the adapters.
        alpha: Scaling numerator: the update is multiplied by ``alpha / r``, or ``alpha / sqrt(r)`` with
            ``scaling="rslora"``.
        dropout: Dropout probability on the adapters' input.
        method: ``"lora"``.
        init: ``"kaiming"`` or ``"gaussian"``.
        scaling: ``"standard"`` or ``"rslora"``.
        exclude: Names or globs of layers to leave as they are.
        train: Names or globs of modules to train whole and save along, such as a new head.
        quantization: ``"nf4"``, an ``NF4Config``, or None for a base in its own precision (plain LoRA).
        optimizer: ``"paged_adamw_8bit"``, or None to keep the class ``configure_optimizers`` returns.
        merge: Whether to merge at the end of training.
        output_dir: Folder for the adapter (in PEFT's format) at the end of training and, with ``merge``, for the merged
            weights.
        adapter: Folder of a saved adapter to start from. Its rank, scaling and targets are used.

    Raises:
        ValueError: If a value is none of the choices.
    """

    def __init__(
        self,
        targets: str | Iterable[str] | Mapping[str, AdapterConfig | dict[str, Any]] = ALL_LINEAR,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        method: str = "lora",
        init: str = "kaiming",
        scaling: str = "standard",
        exclude: str | Iterable[str] = (),
        train: str | Iterable[str] = (),
        quantization: str | NF4Config | None = "nf4",
        optimizer: str | None = "paged_adamw_8bit",
        merge: bool = True,
        output_dir: str | Path | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_choice("method", method, METHODS)
        if optimizer is not None:
            check_choice("optimizer", optimizer, OPTIMIZERS)
        self.config = METHODS[method](r=r, alpha=alpha, dropout=dropout, init=init, scaling=scaling)
        self.targets = with_configs(targets, self.config)
        self.exclude = as_tuple(exclude)
        self.train = as_tuple(train)
        self.quantization = as_quantization(quantization)
        self.paged_8bit = optimizer is not None
        self.merge = merge
        self.output_dir = output_dir
        self.adapter = adapter
        if adapter is not None:
            self._refuse_settings_beside_adapter()
        self._undo: list[Any] = []
        self._remerge = False
        self._checked: set[int] = set()

    # The run, in the order Lightning calls it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the model to be adapted once it stands, for its optimizers, and for its checkpoints."""
        self._release()
        check_trainer(trainer)
        self._remerge = False
        self._checked = set()
        strategy = trainer.strategy
        # No hook lies between configure_model and the restoring of a checkpoint, and none between configure_optimizers
        # and its use (Lightning issues 19658 and 21272), so these methods are wrapped on the instances: the module's
        # until it has been called, the strategy's until teardown.
        self._undo = [
            wrap(strategy, "setup_optimizers", after=lambda *_: self._rewrite_optimizers(trainer, pl_module)),
            wrap(strategy, "load_model_state_dict", before=lambda ckpt, *_, **__: self._before_load(pl_module, ckpt)),
            wrap(
                strategy, "load_optimizer_state_dict", before=lambda ckpt: check_optimizers(ckpt, strategy.optimizers)
            ),
            wrap(pl_module, "configure_model", after=lambda: self._after_configure_model(trainer, pl_module)),
        ]
        # The one method every checkpoint passes through, also with save_weights_only, which skips the hooks of
        # callbacks. It stays wrapped after teardown: trainer.save_checkpoint may be called then.
        if not getattr(strategy, "_lightning_lora_saves", False):
            strategy._lightning_lora_saves = True  # type: ignore[attr-defined]
            wrap(strategy, "save_checkpoint", before=lambda ckpt, *_, **__: _before_save(trainer, ckpt))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the adapters to training mode, whatever mode the base was brought in: their dropout was asked for."""
        for layer in adapted_layers(pl_module).values():
            layer.adapters.train()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep running statistics of frozen normalization layers as they are: the base has to stay the base."""
        whole = tuple(f"{path}." for path in trained_modules(pl_module))
        frozen = [
            name
            for name, module in pl_module.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and not f"{name}.".startswith(whole)
            and module.track_running_stats
            and not any(p.requires_grad for p in module.parameters())
        ]
        for name in frozen:
            pl_module.get_submodule(name).eval()
        if frozen:
            rank_zero_info(f"LoRA: statistics of {listing(frozen)} stay frozen; name them in train= to update them")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Explain a loss that no adapter is part of; torch's own error would not name the cause."""
        check_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before the first step of each optimizer, see that a gradient has reached every adapter it holds."""
        if id(optimizer) not in self._checked:
            self._checked.add(id(optimizer))
            check_gradients(pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, then merge. Not after a ``fast_dev_run``, which should leave nothing behind."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = network(pl_module)
        if self.output_dir is not None and trainer.is_global_zero:
            save_adapter(root, self.output_dir)
        if self.merge:
            _FINETUNES[pl_module].merge(pl_module)
            if self.output_dir is not None and trainer.is_global_zero:
                save_merged(root, self.output_dir)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in teardown, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "exception")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo the wraps; merge again what had been merged before a checkpoint was loaded for a test."""
        self._release()
        if self._remerge:
            _FINETUNES[pl_module].merge(pl_module)
            self._remerge = False

    def state_dict(self) -> dict[str, Any]:
        """The random state, so that a resumed run shuffles and drops out as the uninterrupted one."""
        return {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the random state, early enough for the first shuffle."""
        set_random_state(state_dict["random"])

    # What the wraps call

    def _after_configure_model(self, trainer: Trainer, module: LightningModule) -> None:
        self._undo.pop()()
        self._adapt(trainer, module)

    def _adapt(self, trainer: Trainer, module: LightningModule) -> None:
        """Bring the module to the state this stage needs."""
        finetune = _FINETUNES.get(module)
        if finetune is not None and finetune.is_merged_in(module):
            self._require_same(trainer, module, finetune)
            if trainer.state.fn == "fit":
                rank_zero_info("LoRA: training goes on with the adapters of the last run")
                finetune.unmerge(module)
            return
        if adapted_layers(module):
            finetune = FineTune(module) if finetune is None or finetune.is_merged else finetune
            self._require_same(trainer, module, finetune)
        else:
            self._inject(trainer, module)
            finetune = FineTune(module, self.adapter)
        if finetune is not _FINETUNES.get(module):
            _FINETUNES[module] = finetune
            self._report(module)

    def _inject(self, trainer: Trainer, module: LightningModule) -> None:
        device = None if trainer.strategy.root_device.type == "cpu" else trainer.strategy.root_device
        if self.adapter is not None:
            load_adapter(network(module), self.adapter)
        else:
            plan = resolve(module, self.targets, self.config, exclude=self.exclude, train=self.train)
            self._check_base(module, plan, device)
            apply(module, plan)
            _tell("left as they are", plan.left)
        if self.quantization is not None:
            _tell("not quantized", check_quantizable(adapted_layers(module), device))
            quantize(module, self.quantization, device=device)

    def _check_base(self, module: LightningModule, plan: Plan, device: torch.device | None) -> None:
        """See that the base can be trained on, and quantized if it is to be, before anything is changed."""
        layers = {name: module.get_submodule(name) for name in plan.layers}
        weights = {name: layer.weight.detach() for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        for name, weight in weights.items():
            if weight.is_floating_point() and not weight.is_meta and not is_finite(weight):
                raise TargetError(
                    f"the base weight of {name} holds NaN or infinity. Mend the base model, or exclude={name!r}"
                )
        if self.quantization is not None:
            check_quantizable(layers, device)

    def _require_same(self, trainer: Trainer, module: LightningModule, finetune: FineTune) -> None:
        """Take a module that was adapted before as it is, if it is what this callback would have made."""
        if self.adapter is not None:
            if self.adapter != finetune.adapter:
                raise AdapterError(
                    f"the module holds adapters already, which adapter={str(self.adapter)!r} would overwrite. Drop "
                    "that argument to go on with them, or start from the base model"
                )
            return
        plan = resolve(module, self.targets, self.config, exclude=self.exclude, train=self.train)
        configs = {canonical(name): config for name, config in plan.layers.items() if isinstance(config, LoRAConfig)}
        whole = {id(p) for path in plan.train for p in module.get_submodule(path).parameters()}
        trained = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in whole]
        wanted = describe_loras(configs) | {"train": trained, "dropout": _dropouts(configs)}
        found = finetune.description | {"train": finetune.trained, "dropout": _dropouts(finetune.configs)}
        if self.quantization is None:
            wanted["quantization"] = "none"
        elif finetune.dense - check_quantizable(finetune.layers, trainer.strategy.root_device).keys():
            wanted["quantization"] = "nf4"
        apart = differences(wanted, found)
        if apart:
            raise AdapterError(
                f"the module holds adapters already, and the callback asks for others: {'; '.join(apart)} ('there' is "
                "the callback, 'here' the module). Set the callback to the same values to go on with them. To start "
                "anew on the trained weights, merge(module) if it is not merged yet, and fit copy.deepcopy(module)"
            )

    def _report(self, module: LightningModule) -> None:
        account = summary(module)
        first = account.layers[0]
        rank_zero_info(
            f"LoRA: {first.method} on {len(account.layers)} linear layers (base {first.storage}), training "
            f"{account.trainable:,} of {account.total:,} parameters ({100 * account.trainable / account.total:.2f}%), "
            f"model {account.model_bytes / 2**20:.1f} MiB"
        )

    def _rewrite_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        if not strategy.optimizers:
            return
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        strategy.optimizers = rewrite_optimizers(module, strategy.optimizers, schedulers, paged_8bit=self.paged_8bit)
        for optimizer in strategy.optimizers:
            rank_zero_info(f"LoRA: {optimizer_report(optimizer)}")

    def _before_load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        finetune = _FINETUNES[module]
        if finetune.is_merged:
            finetune.unmerge(module)
            self._remerge = True
        finetune.complete_checkpoint(module, checkpoint)

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _refuse_settings_beside_adapter(self) -> None:
        """An adapter folder brings its own structure; a value beside it that would be ignored is an error."""
        default = LoRAConfig()
        changed = [f.name for f in fields(LoRAConfig) if getattr(self.config, f.name) != getattr(default, f.name)]
        changed += [name for name in ("exclude", "train") if getattr(self, name)] + (
            ["targets"] if self.targets != ALL_LINEAR else []
        )
        if changed:
            raise ValueError(f"adapter={str(self.adapter)!r} brings its own {listing(changed)}; drop these arguments")


def _before_save(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Reduce a checkpoint to the fine-tune; a module whose adapters the user has merged or deleted is saved whole."""
    module = trainer.lightning_module
    finetune = _FINETUNES.get(module)
    if finetune is not None and (finetune.is_merged or adapted_layers(module)):
        finetune.reduce_checkpoint(checkpoint, trainer.strategy.optimizers)


def network(module: LightningModule) -> nn.Module:
    """Return the module that an adapter folder names its layers in.

    Where the LightningModule is a shell around one network, that network. It is the only child with parameters, if all
    adapters lie inside it; then PEFT can load the folder into that network. Else it is the LightningModule.
    """
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None) is not None
    shell = len(children) == 1 and not own and not isinstance(children[0], nn.Linear | LoRALinear)
    return children[0] if shell else module


def _tell(what: str, layers: Mapping[str, str]) -> None:
    if layers:
        rank_zero_info(f"LoRA: {what}: {listing(f'{name} ({reason})' for name, reason in layers.items())}")


def _dropouts(configs: Mapping[str, LoRAConfig]) -> list[str]:
    return sorted({f"{config.dropout:g}" for config in configs.values()})
