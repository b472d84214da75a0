"""``LoRACallback``: one callback turns a LightningModule into a LoRA or QLoRA fine-tune.

It decides *when* things happen in a run; *how* they happen is in ``model``, ``quantization``, ``optim`` and ``io``,
and in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.callbacks.activation_checkpointing import AUTO, checkpoint_blocks
from lightning_lora.callbacks.adapting import Start, adapt, network, unstarted, waits_for_data
from lightning_lora.callbacks.averaging import adapt_early, averagers, check_averagers, check_norms, set_averages_aside
from lightning_lora.callbacks.checkpoints import check_optimizers, complete_checkpoint, reduce_checkpoint
from lightning_lora.callbacks.compat import check_sharding, check_trainer, check_turns
from lightning_lora.callbacks.copying import CopiedAsSet
from lightning_lora.callbacks.finetune import FINETUNES, FineTune
from lightning_lora.callbacks.from_data import check_trainer_for_data, from_checkpoint, from_loader
from lightning_lora.callbacks.gradients import check_gradients, check_loss
from lightning_lora.callbacks.interruption import keep_interrupted_run
from lightning_lora.callbacks.planning import PLANNED, Asked, blocks_to_recompute, plan
from lightning_lora.callbacks.processes import require_sharded, spare_quantized_buffers
from lightning_lora.callbacks.progress import validation_follows
from lightning_lora.callbacks.resume import Resumption, process_states, restore_random_state, tell_what_is_not_restored
from lightning_lora.callbacks.saving import ON_SAVE_ERROR, guard_saves, told
from lightning_lora.callbacks.settings import (
    BASELINES,
    EVA_BATCHES,
    Settings,
    as_config,
    as_quantization,
    as_swap,
    check_choice,
    check_flag,
    check_folder,
    with_configs,
)
from lightning_lora.callbacks.sharded import full_state, load_sharded
from lightning_lora.callbacks.wraps import Undo, substitute, wrap
from lightning_lora.errors import AdapterError, OptimizerError, listing
from lightning_lora.estimation.setup import Setup
from lightning_lora.io.adapter_folder import check_savable, save_adapter
from lightning_lora.io.description import KEY, VERSION
from lightning_lora.io.export import write_model
from lightning_lora.io.keys import canonical
from lightning_lora.model.dequantized import forget_dequantized, keep_dequantized
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.sizes import parse_size
from lightning_lora.model.targets import ALL_LINEAR, as_patterns
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.optim.badam import BAdam
from lightning_lora.optim.galore_adamw import GaLore
from lightning_lora.optim.lora_plus import check_rate
from lightning_lora.optim.report import optimizer_report
from lightning_lora.optim.rewrite import check_references, rewrite_optimizers
from lightning_lora.quantization.formats import AnyConfig


class LoRACallback(CopiedAsSet):
    """Fine-tunes a LightningModule with LoRA, over a base in 4 bits unless told otherwise.

    When the model stands (after ``__init__``, ``setup`` and ``configure_model``), adapters are put into its linear
    layers, everything else is frozen, and the frozen layers under the adapters are quantized. ``torch.optim.Adam`` and
    ``AdamW`` become a paged 8-bit AdamW over the adapters alone, with their schedulers kept. Checkpoints
    hold the adapters alone and resume bit for bit, in the middle of an epoch too with a stateful loader. After training
    the adapters are merged: the module then holds plain layers with its original keys, whose parameters stay frozen
    until ``requires_grad_(True)``.

    Args:
        targets: Layers to adapt: ``"all-linear"`` (all but the output head), a name or glob or several, or a mapping
            from name or glob to a config, or to a dict of the fields that differ from those below, e.g. ``{"*.q_proj":
            {"r": 8}}``. ``[8-15]`` is a number from 8 to 15: ``"layers.[8-15].*.q_proj"``.
        r: Rank of the adapters.
        alpha: Scaling numerator: the update is multiplied by ``alpha / r``, or ``alpha / sqrt(r)`` with
            ``scaling="rslora"``.
        dropout: Dropout probability on the adapters' input.
        method: ``"lora"``, ``"dora"``, ``"lora_fa"`` (``A`` stays as it was drawn) or ``"vera"`` (linear layers alone;
            it has no ``alpha``, ``init`` or ``scaling``, and wants a high ``r`` such as 256). To compare with:
            ``"freeze"`` (nothing but the modules in ``train`` is trained) and ``"full"`` (everything is); these two
            have no adapters, quantize nothing and merge nothing; the run, its optimizers and checkpoints are the same.
        init: How adapters start: ``"kaiming"``, ``"gaussian"`` or ``"orthogonal"``; in the principal part of the weight
            with ``"pissa"``, or faster ``"pissa_niter_4"``; ``"olora"``; fitted to the quantized base with ``"loftq"``.
            With ``"eva"``, in directions of the layers' inputs, with ranks shared between layers: ``fit`` runs a few of
            its training batches first, over the base in its own precision (see docs/methods.md).
        scaling: ``"standard"`` or ``"rslora"``.
        exclude: Names or globs of layers to leave as they are.
        train: Names or globs of modules to train whole and save along, such as a new head.
        train_bias: Biases to train and save along: ``"none"``, ``"adapted"`` (of layers with adapters) or ``"all"``.
        quantization: ``"nf4"``, ``"fp4"``, ``"nf3"``, ``"nf2"`` (with ``init="loftq"``), ``"int8"``, their
            configs (``NF4Config(block_size=128)``), or None for a base in its own precision (plain LoRA). ``"auto"`` is
            ``"nf4"`` under adapters and None for the methods without.
        embeddings: ``"int8"`` stores embeddings and output heads in 8 bit, with an adapter or without; None leaves them
            in their own precision, unless they have an adapter and are stored as ``quantization`` says.
        optimizer: What ``torch.optim.Adam`` and ``AdamW`` become: ``"paged_adamw_8bit"``; with ``method="full"`` also
            ``"galore_adamw"`` or ``"badam"``, or with values ``GaLore(rank=64)``, ``BAdam(switch_every=50)`` (from
            YAML ``{name: galore_adamw, rank: 64}``). None keeps the class ``configure_optimizers`` returns.
        lr_ratio: The learning rate of every factor ``B`` is this multiple of what its optimizer group has (LoRA+, which
            recommends 16); schedulers go on with both.
        merge: Whether to merge at the end of training.
        output_dir: Folder for the adapter (in PEFT's format) at the end of training; with ``merge``, its subfolder
            ``merged`` gets the merged model, and without adapters the trained one.
        adapter: Folder of a saved adapter to start from. Its rank, scaling and targets are used.
        activation_checkpointing: Names or globs of modules (``"layers"``) whose activations are recomputed in the
            backward pass instead of kept; ``"auto"`` recomputes the repeated blocks of a model on a GPU if they would
            not fit; ``"planned"`` what ``memory`` asks for, and without it none; None keeps all.
        dequantized_cache: Memory for weights that stay dequantized while training, instead of being dequantized for
            each product: ``"4GB"`` (10^9 bytes each) or ``"4GiB"``. Results are the same to the bit; None keeps none.
        eva_batches: How many training batches ``init="eva"`` runs at most; fewer, once its directions have settled.
        on_save_error: What to do when a checkpoint cannot be written (a full disk): ``"raise"``, or ``"warn"`` and go
            on training; the last good checkpoint stays in either case.
        memory: What a device has, such as ``"24GB"``: before training, a step of the first batch is estimated, and how
            the base is stored (``quantization="auto"``) and whether blocks are recomputed (``"planned"``, ``"auto"``)
            are chosen so that it fits. If nothing does, ``BudgetError`` says what would. See docs/guides/memory.md.

    Raises:
        TypeError: If a value is of another type than its argument.
        ValueError: If a value is none of the choices, or of no use for the method.
    """

    of_a_run: ClassVar[tuple[str, ...]] = ("_undo", "_remerge", "_checked", "_accumulating", "_resumption")

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
        train_bias: str = "none",
        quantization: str | AnyConfig | None = "auto",
        embeddings: str | None = None,
        optimizer: str | GaLore | BAdam | dict[str, Any] | None = "paged_adamw_8bit",
        lr_ratio: float = 1.0,
        merge: bool = True,
        output_dir: str | Path | None = None,
        adapter: str | Path | None = None,
        activation_checkpointing: str | Iterable[str] | None = PLANNED,
        dequantized_cache: str | None = None,
        eva_batches: int = EVA_BATCHES,
        on_save_error: str = "raise",
        memory: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("on_save_error", on_save_error, ON_SAVE_ERROR)
        check_flag("merge", merge)
        check_folder("output_dir", output_dir)
        check_folder("adapter", adapter)
        check_rate("lr_ratio", lr_ratio)
        if method in BASELINES and lr_ratio != 1.0:
            raise ValueError(f"method={method!r} has no factors A and B, so lr_ratio={lr_ratio} does nothing; drop it")
        config = as_config(method, r=r, alpha=alpha, dropout=dropout, init=init, scaling=scaling)
        self.settings = Settings(
            method=method,
            targets=with_configs(targets, config),
            config=config,
            exclude=as_patterns(exclude, "exclude"),
            train=as_patterns(train, "train"),
            train_bias=train_bias,
            quantization=as_quantization(quantization, method),
            embeddings=embeddings,
            adapter=adapter,
            eva_batches=eva_batches,
        )
        self.swap = as_swap(optimizer, method)
        self.lr_ratio = lr_ratio
        self.merge = merge
        self.output_dir = output_dir
        self.activation_checkpointing = (
            activation_checkpointing
            if activation_checkpointing in (None, AUTO, PLANNED)
            else as_patterns(activation_checkpointing, "activation_checkpointing")
        )
        self.dequantized_cache = (
            None if dequantized_cache is None else parse_size("dequantized_cache", dequantized_cache)
        )
        if self.dequantized_cache is not None and method in BASELINES:
            raise ValueError(
                f"method={method!r} quantizes nothing, so dequantized_cache={dequantized_cache!r} has nothing to keep; "
                "drop it"
            )
        self.on_save_error = on_save_error
        self.memory = None if memory is None else parse_size("memory", memory)
        self._asked = Asked(
            settings=self.settings,
            checkpointing=self.activation_checkpointing,
            dequantized_cache=self.dequantized_cache or 0,
            # What is kept beside a base in few bits wants one.
            any_storage=quantization == "auto" and embeddings is None and dequantized_cache is None,
        )
        if memory is not None and adapter is not None:
            raise ValueError(
                f"memory={memory!r} plans adapters that are to be made, and adapter={str(adapter)!r} brings its own. "
                "Drop memory=, and set quantization= and activation_checkpointing="
            )
        self._begin()

    def _begin(self) -> None:
        self._undo: list[Undo] = []
        self._remerge = False
        self._checked: set[int] = set()
        self._accumulating = False
        self._resumption: Resumption | None = None

    def as_setup(self) -> Setup:
        """Return what of the arguments decides how much memory a run takes: ``estimate(model, batch, callback)``.

        Precision and device are the Trainer's: here those of a :class:`Setup` that nothing is said of.
        """
        return self._asked.setup(self.swap)

    # The run, in the order Lightning calls it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the model to be adapted once it stands, for its optimizers, and for its checkpoints."""
        self._release()
        check_trainer(trainer, self)
        check_turns(trainer.strategy, self.swap)
        check_averagers(trainer, self, quantized=self.settings.quantization is not None)
        self._begin()
        # No hook lies between configure_model and the restoring of a checkpoint, none between configure_optimizers and
        # its use (Lightning issues 19658 and 21272), and none between the loaders and their first iteration, so these
        # methods are wrapped on the instances: the module's until it has been called, the strategy's until teardown.
        strategy = trainer.strategy
        self._undo.append(
            wrap(strategy, "setup_optimizers", after=lambda *_: self._rewrite_optimizers(trainer, pl_module))
        )
        self._undo.append(
            wrap(strategy, "process_dataloader", after=lambda loader: self._restore_loader(trainer, loader))
        )
        if isinstance(strategy, ModelParallelStrategy):
            self._arrange_sharded(strategy, pl_module)
        else:
            self._arrange_loading(trainer, pl_module)
        # The one method every checkpoint passes through, also with save_weights_only, which skips the hooks of
        # callbacks. It stays wrapped after teardown: trainer.save_checkpoint may be called then.
        guard_saves(strategy, lambda checkpoint: _before_save(trainer, checkpoint), self.on_save_error)
        self._undo.append(
            wrap(pl_module, "configure_model", after=lambda: self._after_configure_model(trainer, pl_module))
        )
        if stage == "fit" and averagers(trainer):  # they copy the module in their setup, which comes next
            adapt_early(pl_module)
            check_norms(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the adapters to training mode, whatever mode the base was brought in: their dropout was asked for."""
        for layer in adapted_layers(pl_module).values():
            layer.adapters.train()
        if self.activation_checkpointing not in (None, PLANNED):
            device = trainer.strategy.root_device
            self._undo += checkpoint_blocks(pl_module, self.activation_checkpointing, device)
        if self.dequantized_cache is not None:
            keep_dequantized(pl_module, self.dequantized_cache)
            self._undo.append(partial(forget_dequantized, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give a resumed run the rest of its state, and keep running statistics of frozen norms: the base stays."""
        if self._resumption is not None:
            tell_what_is_not_restored(self._resumption, trainer)
            self._resumption.restore_run(pl_module)
            self._resumption = None
        finetune = FINETUNES[pl_module]
        frozen = [
            name
            for name, module in pl_module.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and not finetune.trains(name)
            and module.track_running_stats
            and not any(p.requires_grad for key, p in module.named_parameters() if key != "bias")
        ]
        for name in frozen:
            pl_module.get_submodule(name).eval()
        if frozen:
            rank_zero_info(f"LoRA: statistics of {listing(frozen)} stay frozen; name them in train= to update them")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Explain a loss that no adapter is part of; torch's own error would not name the cause."""
        check_loss(loss)
        self._accumulating = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Before the first step of each optimizer, see that a gradient has reached every adapter it holds."""
        self._accumulating = False
        if id(optimizer) not in self._checked:
            self._checked.add(id(optimizer))
            check_gradients(pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, then merge: after averages have been copied back, and not after a ``fast_dev_run``."""
        later = averagers(trainer)
        if later:
            self._undo.append(wrap(later[-1], "on_train_end", after=lambda *_: self._finish(trainer, pl_module)))
        else:
            self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a run that had nothing left to train, which Lightning ends without ``on_train_end``, or say so."""
        finetune = FINETUNES[pl_module]
        unmerged = self.merge and finetune.layers and not finetune.is_merged
        if self._resumption is not None and not averagers(trainer):  # killed between its last batch and its end
            self._finish(trainer, pl_module)
        elif unmerged and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("LoRA: no step was trained in this run, so the adapters are neither written nor merged")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep a run that was told to stop; then do as in teardown, which Lightning calls only after a good end."""
        keep_interrupted_run(trainer, exception)
        self.teardown(trainer, pl_module, "exception")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo the wraps; merge again what had been merged before a checkpoint was loaded for a test."""
        self._release()
        if self._remerge:
            FINETUNES[pl_module].merge(pl_module)
            self._remerge = False

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Something, so that Lightning names this callback where a Trainer without it loads one of its checkpoints."""
        return {"version": VERSION}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what each process needs to go on bit for bit; not called for weights alone, which nothing resumes."""
        states = process_states(trainer, pl_module, accumulating=self._accumulating)
        checkpoint[KEY] = {"processes": states, "validation_due": validation_follows(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the random state, early enough for the first shuffle."""
        if trainer.state.fn == "fit":
            entry = checkpoint[KEY]
            self._resumption = Resumption.of(
                checkpoint["loops"]["fit_loop"],
                entry.get("processes", []),
                validation_due=entry.get("validation_due", False),
            )
            restore_random_state(self._resumption.processes)

    # What the wraps call

    def _arrange_loading(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        self._undo += [
            wrap(
                strategy,
                "load_model_state_dict",
                before=lambda ckpt, *_, **__: self._before_load(trainer, module, ckpt),
            ),
            wrap(
                strategy,
                "load_optimizer_state_dict",
                before=lambda checkpoint: check_optimizers(checkpoint, strategy.optimizers),
                after=lambda _: _after_optimizers_loaded(strategy.optimizers),
            ),
        ]

    def _arrange_sharded(self, strategy: ModelParallelStrategy, module: LightningModule) -> None:
        check_sharding(
            strategy,
            merge=self.merge and self.settings.has_adapters,
            output_dir=self.output_dir,
            swapped=self.swap is not None,
            dequantized_cache=self.dequantized_cache,
        )
        self._undo += [
            substitute(strategy, "lightning_module_state_dict", partial(full_state, module)),
            substitute(strategy, "load_checkpoint", partial(load_sharded, strategy, module, strategy.load_checkpoint)),
        ]

    def _restore_loader(self, trainer: Trainer, loader: object) -> None:
        if self._resumption is not None and trainer.training:
            self._resumption.restore_loader(loader)

    def _after_configure_model(self, trainer: Trainer, module: LightningModule) -> None:
        self._undo.pop()()
        if self.memory is not None:
            self._plan(trainer, module, self.memory)
        if not waits_for_data(module, self.settings):
            self._adapt(trainer, module)
            return
        # Ranks come from a checkpoint, which is loaded next, or from batches: before the strategy makes optimizers.
        check_trainer_for_data(trainer, module)
        self._undo.append(wrap(trainer.strategy, "setup", before=lambda *_: self._before_strategy(trainer, module)))

    def _plan(self, trainer: Trainer, module: LightningModule, budget: int) -> None:
        """Set what was left open so that the run fits; once for each module."""
        if trainer.state.fn != "fit" or module in FINETUNES or adapted_layers(module):
            return
        asked = self._asked
        setup = plan(trainer, module, asked.setup(self.swap, trainer), budget, asked)
        self.settings = asked.settings if not asked.any_storage else replace(asked.settings, quantization=setup.storage)
        self.activation_checkpointing = blocks_to_recompute(module, setup)

    def _before_strategy(self, trainer: Trainer, module: LightningModule) -> None:
        if waits_for_data(module, self.settings):
            self._adapt(trainer, module, partial(from_loader, trainer, self.settings.eva_batches))

    def _adapt(self, trainer: Trainer, module: LightningModule, start: Start = unstarted) -> None:
        training, device = trainer.state.fn == "fit", trainer.strategy.root_device
        finetune = adapt(module, self.settings, device=device, training=training, start=start)
        if training:
            finetune.thaw(module)
            self._check_output(module, finetune)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            require_sharded(module)
        if isinstance(trainer.strategy, DDPStrategy):
            self._undo.append(spare_quantized_buffers(module))

    def _check_output(self, module: LightningModule, finetune: FineTune) -> None:
        """See that the end of training can write what ``output_dir`` asks for, rather than fail there."""
        if self.output_dir is None or not finetune.layers:
            return
        try:
            check_savable(network(module))
        except AdapterError as error:
            raise AdapterError(
                f"output_dir={str(self.output_dir)!r} could not get the adapter at the end of training: {error}. To "
                "train it all the same, drop output_dir"
            ) from None

    def _rewrite_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        if not strategy.optimizers:
            return
        if any(isinstance(optimizer, _MockOptimizer) for optimizer in strategy.optimizers):
            raise OptimizerError("configure_optimizers returns None, so nothing would be trained. Return an optimizer")
        built = list(strategy.optimizers)
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        finetune = FINETUNES[module]
        finetune.thaw(module)  # configure_optimizers may have unfrozen the base, as a full fine-tune's does
        strategy.optimizers = rewrite_optimizers(
            module,
            built,
            schedulers,
            swap=self.swap,
            lr_ratio=self.lr_ratio,
            owners=finetune.owners,
            names={p: canonical(name) for name, p in module.named_parameters()},
        )
        if not module.automatic_optimization:
            check_references(module, built, strategy.optimizers)
        for optimizer in strategy.optimizers:
            rank_zero_info(f"LoRA: {optimizer_report(optimizer)}")
        if isinstance(self.swap, BAdam):  # it freezes what waits for its turn
            self._undo.append(partial(finetune.thaw, module))

    def _before_load(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if waits_for_data(module, self.settings):
            self._adapt(trainer, module, partial(from_checkpoint, checkpoint))
        finetune = FINETUNES[module]
        if finetune.is_merged:
            finetune.unmerge(module)
            self._remerge = True
        complete_checkpoint(checkpoint, finetune, module)
        if trainer.state.fn != "fit":
            set_averages_aside(trainer, checkpoint)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        finetune, folder = FINETUNES[module], self.output_dir
        forget_dequantized(module)  # merging needs memory itself
        if folder is not None and trainer.is_global_zero:
            with told(folder, self.on_save_error):
                self._write(network(module), finetune, Path(folder))
        if self.merge:
            finetune.merge(module)

    def _write(self, root: nn.Module, finetune: FineTune, folder: Path) -> None:
        """Write the adapter, and the merged model to a folder of its own.

        transformers loads an adapter that lies beside merged weights on top of them.
        """
        if finetune.layers:
            save_adapter(root, folder)
        if self.merge or not finetune.layers:
            write_model(root, folder / "merged")

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()


def _before_save(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Reduce a checkpoint to the fine-tune; a module whose adapters the user has merged or deleted is saved whole."""
    module = trainer.lightning_module
    finetune = FINETUNES.get(module)
    if finetune is not None and finetune.is_in(module):
        reduce_checkpoint(checkpoint, finetune, trainer.strategy.optimizers)


def _after_optimizers_loaded(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        rank_zero_info(f"LoRA: resumed {optimizer_report(optimizer)}")
