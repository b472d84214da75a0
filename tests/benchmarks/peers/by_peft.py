"""PEFT: ``get_peft_model``, over bitsandbytes' ``Linear4bit`` for NF4, with its default adapters or those in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import bitsandbytes
import peft
import torch
from torch import nn

from peers.contender import Contender, Factors, Setting
from peers.workload import DTYPE, Workload, named_targets


class Peft(Contender):
    """As it comes: adapters in float32, to which it casts the input of each layer."""

    name: ClassVar[str] = "PEFT default"
    adapters_in_float32: ClassVar[bool] = True

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        model.is_loaded_in_4bit = setting.base == "nf4"  # what PEFT looks for before it adapts a Linear4bit
        config = peft.LoraConfig(
            r=setting.r,
            lora_alpha=setting.alpha,
            lora_dropout=setting.dropout,
            target_modules=list(workload.targets),
        )
        return peft.get_peft_model(model, config, autocast_adapter_dtype=self.adapters_in_float32)

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        for name in named_targets(model, workload):
            model.set_submodule(name, _linear4bit(model.get_submodule(name), device))
        return model

    def factors(self, model: Any) -> Factors:
        layers: dict[str, Any] = {
            name: module for name, module in self.plain(model).named_modules() if hasattr(module, "lora_A")
        }
        return {name: (its.lora_A["default"].weight, its.lora_B["default"].weight) for name, its in layers.items()}

    def plain(self, model: Any) -> Any:
        return model.base_model.model

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def merge(self, model: Any) -> None:
        model.merge_and_unload()


class PeftBf16(Peft):
    """``autocast_adapter_dtype=False``: adapters in bf16, which then are the master weights."""

    name: ClassVar[str] = "PEFT bf16 adapters"
    adapters_in_float32: ClassVar[bool] = False


def _linear4bit(linear: nn.Linear, device: torch.device) -> nn.Module:
    made: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=DTYPE,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    made.bias = linear.bias
    if device.type == "cpu":  # otherwise an evaluation repacks the weight, after which nothing trains
        made.support_avx512bf16_for_cpu = False
    return made.to(device)
