"""The frozen model without adapters, whose backward pass goes through to the embedding: what no adapter can pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from products import six_products
from torch import nn

from peers.contender import Contender, Factors, Setting
from peers.machine import Machine
from peers.workload import Workload


class Floor(Contender):
    """Dense in bf16, whatever the others store."""

    name: ClassVar[str] = "frozen floor"

    def build(self, model: Any, workload: Workload, setting: Setting, machine: Machine) -> Any:
        return model.train()

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return model

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        return model

    def factors(self, model: Any) -> Factors:
        return {}


class FloorAndProducts(Floor):
    """Then the six products that each adapter adds, by themselves and without a graph.

    What no adapter can pass that multiplies with torch's products.
    """

    name: ClassVar[str] = "floor and products"

    def build(self, model: Any, workload: Workload, setting: Setting, machine: Machine) -> Any:
        layers = [its for name, its in model.named_modules() if name.rpartition(".")[2] in workload.targets]
        self.products = [self.of(layer, workload.tokens, setting.r) for layer in layers]
        return super().build(model, workload, setting, machine)

    def of(self, layer: nn.Linear, tokens: int, r: int) -> Callable[[], None]:
        weight = layer.weight
        rows = [weight.new_empty(tokens, features).normal_() for features in (layer.in_features, layer.out_features)]
        factors = weight.new_empty(r, layer.in_features).normal_(), weight.new_empty(layer.out_features, r).normal_()
        return six_products(*factors, *rows)

    def step(self, forward_backward: Callable[[], None], machine: Machine) -> Callable[[], None]:
        def both() -> None:
            forward_backward()
            for products in self.products:
                products()

        return both
