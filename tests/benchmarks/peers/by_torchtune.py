"""torchtune's ``LoRALinear``, over torchao's NF4 where the base is quantized: adapters in bf16, as in its recipes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from peers.contender import Contender, Factors, Setting
from peers.machine import Machine
from peers.workload import DTYPE, Workload, named_targets


class Torchtune(Contender):
    """Its layers in place of the model's."""

    name: ClassVar[str] = "torchtune layers"
    unlike: ClassVar[dict[str, str]] = {"nf4": "torchao rounds the maxima of blocks in another way than bitsandbytes"}

    def unavailable(self, machine: Machine) -> str | None:
        try:
            import torchtune.modules.peft  # noqa: F401
        except Exception as error:
            return f"torchtune cannot be imported: {error}"
        return None

    def inject(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        for name in named_targets(model, workload):
            model.set_submodule(name, _adapted(model.get_submodule(name), setting, device))
        return model

    def quantize(self, model: Any, workload: Workload, setting: Setting, device: torch.device) -> Any:
        from torchao.dtypes.nf4tensor import to_nf4

        for name in named_targets(model, workload):
            linear = model.get_submodule(name)
            linear.weight = nn.Parameter(to_nf4(linear.weight.detach().to(device)), requires_grad=False)
        return model

    def factors(self, model: Any) -> Factors:
        layers: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}
        return {name: (its.lora_a.weight, its.lora_b.weight) for name, its in layers.items()}


def _adapted(linear: nn.Linear, setting: Setting, device: torch.device) -> nn.Module:
    from torchtune.modules.peft import LoRALinear

    with torch.device("meta"):
        made: Any = LoRALinear(
            linear.in_features,
            linear.out_features,
            rank=setting.r,
            alpha=setting.alpha,
            dropout=setting.dropout,
            use_bias=linear.bias is not None,
        )
    made.to(DTYPE).to_empty(device=device)  # by its own rule, the adapter alone
    made.weight, made.bias = linear.weight, linear.bias
    made._quantize_base = setting.base == "nf4"
    made.initialize_parameters()
    return made
