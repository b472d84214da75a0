"""What LoRA is compared with: a module whose base is frozen and some modules trained, and one trained in full.

Neither has adapters. From here on they go through the same run as those: optimizers, checkpoints, resuming.
"""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks.finetune import FINETUNES, FineTune
from lightning_lora.callbacks.settings import Settings
from lightning_lora.errors import AdapterError, UnsupportedError, listing
from lightning_lora.io.description import differences
from lightning_lora.model.layers import adapted_layers
from lightning_lora.model.summary import summary
from lightning_lora.model.targets import resolve_train
from lightning_lora.nn.base import QuantizedLinear, adopter_of


def prepare(module: LightningModule, settings: Settings) -> FineTune:
    """Train the modules that a method without adapters trains, and freeze the rest; once, or as an earlier run did.

    Args:
        module: A module that stands.
        settings: ``"freeze"`` with what to train, or ``"full"``.

    Raises:
        AdapterError: If the module holds adapters, or an earlier run trained something else in it.
        TargetError: If a name to train matches nothing.
        UnsupportedError: If what is to be trained is stored in few bits.
    """
    if adapted_layers(module):
        raise AdapterError(
            f"the module holds adapters, which method={settings.method!r} knows nothing of. merge(module) first, or "
            "pass their method"
        )
    named = resolve_train(module, settings.train)
    whole = ("",) if settings.method == "full" else named  # full training includes what train= names
    finetune = FineTune.of_modules(module, settings.method, whole)
    known = FINETUNES.get(module)
    if known is not None and (not known.layers or known.is_merged_in(module)):
        _require_equal(finetune, known)
        return known
    _require_trainable(module, finetune)
    module.requires_grad_(False)
    for path in whole:
        module.get_submodule(path).requires_grad_(True)
    FINETUNES[module] = finetune
    account = summary(module)
    rank_zero_info(
        f"LoRA: no adapters (method {settings.method!r}), training {account.trainable:,} of {account.total:,} "
        f"parameters ({100 * account.trainable / account.total:.2f}%), model {account.model_bytes / 2**20:.1f} MiB"
    )
    return finetune


def _require_equal(wanted: FineTune, known: FineTune) -> None:
    apart = differences(wanted.description, known.description)
    if apart:
        raise AdapterError(
            f"the module was trained before, in another way: {'; '.join(apart)} ('there' is the callback, 'here' the "
            "module). Set the callback to the same values to go on. To start anew on the trained weights, fit "
            "copy.deepcopy(module)"
        )


def _require_trainable(module: LightningModule, finetune: FineTune) -> None:
    packed = [
        path
        for path, layer in module.named_modules()
        if finetune.trains(path) and (isinstance(layer, QuantizedLinear) or adopter_of(layer) is not None)
    ]
    packed += [name for name in finetune.trained if not module.get_parameter(name).is_floating_point()]
    if packed:
        raise UnsupportedError(
            f"{listing(packed)} is stored in few bits, which cannot be trained. Load the model in its own precision, "
            "or use method='lora'"
        )
