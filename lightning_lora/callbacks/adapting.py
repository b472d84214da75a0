"""Bringing a module to the state a run needs: adapted anew, as it was left by an earlier run, or unmerged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_lora.callbacks.baselines import prepare
from lightning_lora.callbacks.finetune import FINETUNES, FineTune, Owners
from lightning_lora.callbacks.processes import is_sharded, require_equal_bases
from lightning_lora.callbacks.settings import Settings
from lightning_lora.errors import AdapterError, TargetError, UnsupportedError, listing
from lightning_lora.io.adapter_folder import load_adapter
from lightning_lora.io.description import describe_configs, describe_starts, differences
from lightning_lora.io.keys import canonical
from lightning_lora.model.biases import bias_of
from lightning_lora.model.eva import start_in
from lightning_lora.model.inject import apply
from lightning_lora.model.layers import adapted_layers, adapter_names
from lightning_lora.model.merge import is_finite
from lightning_lora.model.split import layer_at, part_names
from lightning_lora.model.summary import summary
from lightning_lora.model.targets import Plan, resolve
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterConfig
from lightning_lora.nn.attention import PROJECTIONS
from lightning_lora.nn.base import QuantizedLinear, adopter_of, stored_weight
from lightning_lora.nn.kinds import has_kind
from lightning_lora.nn.low_rank import LowRankConfig
from lightning_lora.nn.split import Split
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.edges import edges
from lightning_lora.quantization.quantize import check_quantizable, quantize, refuse_unfitted

Start = Callable[[LightningModule, Plan], tuple[Plan, Mapping[str, Tensor]]]
"""Given a module and its plan, the plan with ranks where these are known, and directions to start in where not."""


def waits_for_data(module: LightningModule, settings: Settings) -> bool:
    """Whether a module cannot be adapted before there is data, or a checkpoint: the ranks come from there."""
    finetune = FINETUNES.get(module)
    known = finetune is not None and (not finetune.layers or finetune.is_merged_in(module))
    return settings.starts_from_data and not known and not adapted_layers(module)


def unstarted(_: LightningModule, plan: Plan) -> tuple[Plan, Mapping[str, Tensor]]:
    """A plan in which nothing starts from data."""
    return plan, {}


def adapt(
    module: LightningModule,
    settings: Settings,
    *,
    device: torch.device,
    training: bool,
    start: Start = unstarted,
) -> FineTune:
    """Adapt ``module``, or take it up where an earlier run left it; nothing is injected or quantized twice.

    A method without adapters has its parameters frozen and trained as it says instead.

    Args:
        module: A module that stands: its layers are built and hold their weights.
        settings: What it is to be.
        device: Where it will run; layers are quantized there.
        training: Whether it is going to be trained, and merged layers have to become adapted ones again.
        start: What gives adapters that start from data their ranks and starts, if there are any.

    Raises:
        AdapterError: If it holds adapters, or was trained before, in another way than the settings say.
        TargetError: If the settings do not fit it.
        QuantizationError: If its base cannot be quantized, or differs between processes.
        UnsupportedError: If its weights are sharded already.
    """
    if not settings.has_adapters:
        return prepare(module, settings)
    finetune = FINETUNES.get(module)
    if finetune is not None and not finetune.layers:
        raise AdapterError(
            f"the module was trained before with method={finetune.description['method']!r}. To put adapters on the "
            "trained weights, fit copy.deepcopy(module)"
        )
    if finetune is not None and finetune.is_merged_in(module):
        _require_same(module, settings, finetune, device)
        if training:
            rank_zero_info("LoRA: training goes on with the adapters of the last run")
            finetune.unmerge(module)
        return finetune
    if adapted_layers(module):
        _require_default(module)
        if finetune is None or finetune.is_merged:
            finetune = FineTune.of_adapters(module)
        _require_same(module, settings, finetune, device)
    else:
        owners = _inject(module, settings, device, start)
        finetune = FineTune.of_adapters(module, owners, adapter=settings.adapter)
    if finetune is not FINETUNES.get(module):
        FINETUNES[module] = finetune
        _report(module)
    return finetune


def network(module: LightningModule) -> nn.Module:
    """Return the module that an adapter folder names its layers in.

    Where the LightningModule is a shell around one network, that network. It is the only child with parameters, if all
    adapters lie inside it; then PEFT can load the folder into that network. Else it is the LightningModule.
    """
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None) is not None
    shell = len(children) == 1 and not own and not _is_replaced(children[0])
    return children[0] if shell else module


def _is_replaced(child: nn.Module) -> bool:
    """Whether a module is, or stands in the place of, what adapting replaces as a whole."""
    return isinstance(child, AdaptedLayer | Split) or has_kind(child) or bool(part_names(child))


def _inject(module: LightningModule, settings: Settings, device: torch.device, start: Start) -> Owners:
    _check_stored(module, settings.quantization)
    where = None if device.type == "cpu" else device
    packed = _packed_weights(module)
    if settings.adapter is not None:
        load_adapter(network(module), settings.adapter)
        if settings.quantization is not None:
            require_equal_bases(_dense_weights(module))
    else:
        plan = planned(module, settings)
        _check_base(module, plan, settings, where)
        plan, found = start(module, plan)
        apply(module, plan, device=where)
        if found:
            with isolate_rng():  # the run goes on as with any other start: made anew, adapters draw again
                start_in(module, found)
        _tell("left as they are", plan.left)
    owners = _owners(module, packed)
    if settings.quantization is not None:
        at_edges, kept = _edges(module, settings)
        inside = {name: layer for name, layer in adapted_layers(module).items() if name not in at_edges}
        _tell("not quantized", kept | check_quantizable(inside, settings.quantization, where))
        quantize(module, settings.quantization, device=where, embeddings=settings.embeddings)
        require_equal_bases(_taken_off(module))
    _tell("in few bits without an adapter, which no merged export can hold", _unadapted(module))
    return owners


def _unadapted(module: nn.Module) -> dict[str, str]:
    """The layers that were quantized when they were loaded and have no adapter now, with how they are stored."""
    under = {layer.base_layer for layer in adapted_layers(module).values()}
    named = module.named_modules()
    return {name: m.storage for name, m in named if isinstance(m, QuantizedLinear) and m not in under}


def _check_stored(module: nn.Module, config: QuantizationConfig | None) -> None:
    """See that layers that were quantized when they were loaded are what the settings ask for."""
    wanted = "None" if config is None else config.storage
    others = {
        name: layer.storage
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear) and layer.origin is not None and layer.storage != wanted
    }
    if others:
        storage = next(iter(others.values()))
        raise AdapterError(
            f"{listing(others)} is stored as {storage} already, and the callback asks for quantization={wanted}. Pass "
            f"the same to both: quantization={storage.partition('/')[0]!r}, or the config that load_base was given"
        )


def planned(module: nn.Module, settings: Settings) -> Plan:
    """What the settings ask for in this module."""
    return resolve(
        module,
        settings.targets,
        settings.config,
        exclude=settings.exclude,
        train=settings.train,
        train_bias=settings.train_bias,
    )


def _edges(
    module: nn.Module, settings: Settings, train: tuple[str, ...] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What ``embeddings`` stores in few bits, and what of these has to stay as it is, with the reason."""
    return ({}, {}) if settings.embeddings is None else edges(module, train)


def _taken_off(module: nn.Module) -> dict[str, Tensor]:
    """The bits of what the bases were quantized without."""
    buffers = dict(module.named_buffers())
    return {name: bits for name, bits in buffers.items() if name.endswith((".taken_A", ".taken_B"))}


def _packed_weights(module: nn.Module) -> MutableMapping[Tensor, str]:
    """The weights that attentions keep for three projections in one, with the name of the attention."""
    found: MutableMapping[Tensor, str] = WeakIdKeyDictionary()
    for name, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None:
            found[child.in_proj_weight] = name
    return found


def _owners(module: nn.Module, packed: MutableMapping[Tensor, str]) -> Owners:
    owners: Owners = WeakIdKeyDictionary()
    layers = adapted_layers(module)
    owners.update((weight, (layers[path],)) for path, weight in _dense_weights(module).items())
    for weight, path in packed.items():
        inside = tuple(layers[f"{path}.{name}"] for name in PROJECTIONS[:3] if f"{path}.{name}" in layers)
        owners.update({weight: inside} if inside else {})
    return owners


def _dense_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapters that are not quantized, by the layer they belong to."""
    bases = {path: layer.base_layer for path, layer in adapted_layers(module).items()}
    return {path: stored_weight(base) for path, base in bases.items() if not isinstance(base, QuantizedLinear)}


def _check_base(module: LightningModule, plan: Plan, settings: Settings, device: torch.device | None) -> None:
    """See that the base can be trained on, and quantized if it is to be, before anything is changed."""
    at_edges, _ = _edges(module, settings, plan.train)
    inside = {name: layer_at(module, name) for name in plan.layers if name not in at_edges}
    layers = {name: layer_at(module, name) for name in plan.layers} | at_edges
    weights = {
        name: stored_weight(layer).detach()
        for name, layer in layers.items()
        if not isinstance(layer, QuantizedLinear) and adopter_of(layer) is None
    }
    sharded = [name for name, weight in weights.items() if is_sharded(weight)]
    if sharded:
        raise UnsupportedError(
            f"{listing(sharded)} is sharded already, and the gradients of an adapter put there now would not be "
            "reduced between processes. Call inject(self, ...) in configure_model, before fully_shard"
        )
    empty = [name for name, weight in weights.items() if weight.is_meta]
    if empty:
        raise TargetError(
            f"{listing(empty)} is on the meta device and holds no weights to adapt. Load them in configure_model, "
            "e.g. load_state_dict(..., assign=True)"
        )
    for name, weight in weights.items():
        if weight.is_floating_point() and not is_finite(weight):
            raise TargetError(
                f"the base weight of {name} holds NaN or infinity. Mend the base model, or exclude={name!r}"
            )
    if settings.quantization is not None:
        refuse_unfitted(plan.layers, check_quantizable(inside, settings.quantization, device))
        require_equal_bases(weights)


def _require_default(module: LightningModule) -> None:
    """A run trains one adapter, by the name that it gives one itself."""
    strangers = {name: layer for name, layer in adapted_layers(module).items() if "default" not in layer.adapters}
    if strangers:
        raise AdapterError(
            f"the callback trains the adapter 'default', and {listing(strangers)} has "
            f"{listing(adapter_names(module))}. Inject it under that name (inject without name=), or without the "
            "callback train what activate(module, ...) says"
        )


def _require_same(module: LightningModule, settings: Settings, finetune: FineTune, device: torch.device) -> None:
    """Take a module that was adapted before as it is, if it is what the settings would have made."""
    if settings.adapter is not None:
        if settings.adapter != finetune.adapter:
            raise AdapterError(
                f"the module holds adapters already, which adapter={str(settings.adapter)!r} would overwrite. Drop "
                "that argument to go on with them, or start from the base model"
            )
        return
    plan = planned(module, settings)
    configs = {canonical(name): config for name, config in plan.layers.items()}
    whole = {id(p) for path in plan.train for p in module.get_submodule(path).parameters()}
    whole |= {id(bias_of(module.get_submodule(path))) for path in plan.biases}
    trained = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in whole]
    configs |= {  # EVA has chosen their ranks
        name: found
        for name, found in finetune.configs.items()
        if name in configs and _from_data(found) and _from_data(configs[name])
    }
    wanted = describe_configs(configs) | describe_starts(configs)
    wanted |= {"train": trained, "dropout": _dropouts(configs)}
    found = finetune.description | {"train": finetune.trained, "dropout": _dropouts(finetune.configs)}
    if settings.quantization is None:
        wanted["quantization"] = "none"
    elif _differs_in_storage(finetune, settings.quantization, device):
        wanted["quantization"] = settings.quantization.name
    if (settings.embeddings is not None) != bool(found.get("embeddings")):
        wanted["embeddings"] = settings.embeddings
    apart = differences(wanted, found)
    if apart:
        raise AdapterError(
            f"the module holds adapters already, and the callback asks for others: {'; '.join(apart)} ('there' is "
            "the callback, 'here' the module). Set the callback to the same values to go on with them. To start "
            "anew on the trained weights, merge(module) if it is not merged yet, and fit copy.deepcopy(module)"
        )


def _differs_in_storage(finetune: FineTune, config: QuantizationConfig, device: torch.device) -> bool:
    """Whether a layer could be quantized and is not, or was quantized by us to another format."""
    at_edges = {
        name
        for name, layer in finetune.layers.items()
        if isinstance(layer.base_layer, QuantizedLinear) and layer.base_layer.edge
    }
    inside = {name: layer for name, layer in finetune.layers.items() if name not in at_edges}
    formats = {
        layer.base_layer.storage.partition("/")[0]
        for layer in inside.values()
        if isinstance(layer.base_layer, QuantizedLinear) and layer.base_layer.origin is not None
    }
    waiting = finetune.dense - check_quantizable(inside, config, device).keys()
    return bool(waiting or formats - {config.name})


def _report(module: LightningModule) -> None:
    account = summary(module)
    first = account.layers[0]
    rank_zero_info(
        f"LoRA: {first.method} on {len(account.layers)} layers (base {first.storage}), training "
        f"{account.trainable:,} of {account.total:,} parameters ({100 * account.trainable / account.total:.2f}%), "
        f"model {account.model_bytes / 2**20:.1f} MiB"
    )


def _tell(what: str, layers: Mapping[str, str]) -> None:
    if layers:
        rank_zero_info(f"LoRA: {what}: {listing(f'{name} ({reason})' for name, reason in layers.items())}")


def _dropouts(configs: Mapping[str, AdapterConfig]) -> list[str]:
    return sorted({f"{config.dropout:g}" for config in configs.values()})


def _from_data(config: AdapterConfig) -> bool:
    return isinstance(config, LowRankConfig) and config.starts_from == "data"
