"""A module of stacked experts with its parameters as layers of their own, each of which can hold adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import QuantizedLinear, dense_weight, share_hooks, weight_dtype
from lightning_lora.nn.copied import copied
from lightning_lora.nn.experts import ExpertsKind, StackedWeight
from lightning_lora.nn.grouped_experts import multiplies_groups, reading
from lightning_lora.nn.kinds import kind_of
from lightning_lora.nn.split import Split


class SplitExperts(Split):
    """The code of a module with stacked experts, run on ``W_e + s B_e A_e`` in the place of its parameters.

    Right for whatever that code does (a loop over experts, ``bmm``, ``einsum``), and dear: for each call the weights of
    all experts are computed, whichever are used, and autograd keeps them and makes a gradient of their size. In half
    precision the sum is rounded, as a merged weight is: an update below that is not seen, though its gradient is. What
    multiplies in groups pays for none of this (:mod:`lightning_lora.nn.grouped_experts`). A quantized base is
    dequantized as a whole; elsewhere activation checkpointing around the block frees it between forward and backward.

    Args:
        source: The module to stand for, left as it is.

    Attributes:
        base_module: A shallow copy of it without the stacked parameters.
    """

    base_module: nn.Module

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        stacks = stacked_parameters(source)
        self._order = tuple(source._parameters)
        self._names = tuple(stacks)
        transposed = bool(getattr(source, "is_transposed", False))
        for name, parameter in stacks.items():
            self.add_module(name, StackedWeight(parameter, transposed=transposed))
        self.base_module = base = copied(source)
        for name in stacks:
            del base._parameters[name]
        share_hooks(nn.Module(), base)  # they run around this module
        self.train(source.training)

    def parts(self) -> dict[str, nn.Module]:
        """The stacked parameters, by their names."""
        return {name: self.get_submodule(name) for name in self._names}

    def experts_in(self, name: str) -> int:
        """How many matrices a stack holds."""
        layer = self.get_submodule(name)
        kind = layer.kind if isinstance(layer, AdaptedLayer) else kind_of(layer)
        assert isinstance(kind, ExpertsKind)
        return kind.experts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code on the adapted weights."""
        if multiplies_groups(self.base_module):
            with reading(self.base_module, self.parts(), _read):
                return self.base_module(*args, **kwargs)
        weights = {name: _read(layer) for name, layer in self.parts().items()}
        return torch.func.functional_call(self.base_module, weights, args, kwargs)

    @torch.no_grad()
    def joined(self, layers: Mapping[str, nn.Module] | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the module with the weights of ``layers`` as its parameters."""
        layers = self.parts() if layers is None else layers
        plain = copied(self.base_module)
        held = plain._parameters
        for name, layer in layers.items():
            stored = dict(layer.named_parameters(recurse=False)).get("weight")
            wanted = dtype or weight_dtype(layer)
            fits = stored is not None and stored.dtype == wanted
            held[name] = stored if fits else nn.Parameter(dense_weight(layer, wanted), requires_grad=False)
        plain._parameters = {name: held[name] for name in self._order}
        return plain.train(self.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_module")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself that hold a matrix for each of several experts.

    Modules that hold other layers with parameters have none, and neither have torch's own (a transposed convolution's
    weight has three axes too), nor those whose code may not read the parameters.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None and not is_lazy(p)}
    found = {name: p for name, p in own.items() if p.dim() == 3 and len(p) > 1 and p.is_floating_point()}
    if not found or type(module).__module__.startswith("torch."):
        return {}
    changed = "forward" in vars(module) or parametrize.is_parametrized(module)
    inner = any(True for child in module.children() for _ in child.parameters())
    return {} if changed or inner else found


def _read(layer: nn.Module) -> Tensor:
    """Return the adapted weight; where the base is dequantized for this, the updates are added in its place."""
    if not isinstance(layer, AdaptedLayer):
        return dense_weight(layer, weight_dtype(layer))
    base = layer.base_layer
    # Detached, for autograd copies the whole gradient where a view of a tensor was written to.
    weight, is_ours = dense_weight(base, weight_dtype(base)).detach(), isinstance(base, QuantizedLinear)
    with torch.autocast(layer.device.type, enabled=False):  # it would round B A to half precision
        for name in layer.computing:
            adapter = layer.adapter(name)
            merge = adapter.piece_merger() if is_ours else None
            weight = adapter.merged(weight) if merge is None else merge(weight, slice(None))
            is_ours = True
    return weight
