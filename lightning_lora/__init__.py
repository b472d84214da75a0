"""LoRA and QLoRA for PyTorch Lightning: one callback turns any LightningModule into a fine-tune."""

from typing import TYPE_CHECKING, Any

from lightning_lora.callbacks.loading import load_from_checkpoint
from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.callbacks.monitor import AdapterMonitor
from lightning_lora.errors import (
    AdapterError,
    CheckpointError,
    GradientError,
    LoadError,
    LoRAError,
    MergeError,
    OptimizerError,
    QuantizationError,
    TargetError,
    UnsupportedError,
)
from lightning_lora.estimation.estimate import estimate
from lightning_lora.estimation.setup import Setup
from lightning_lora.io.adapter_folder import adapter_state_dict, load_adapter, save_adapter
from lightning_lora.io.export import export_merged
from lightning_lora.io.hub import pull_adapter, push_adapter
from lightning_lora.io.several import load_adapters, save_adapters
from lightning_lora.loading.load_base import load_base
from lightning_lora.loading.load_quantized import load_quantized
from lightning_lora.loading.save_quantized import save_quantized
from lightning_lora.model.active import activate, delete_adapter, disabled
from lightning_lora.model.combine import combine
from lightning_lora.model.eva import initialize_eva
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge
from lightning_lora.model.parameters import adapter_parameters
from lightning_lora.model.routing import routed
from lightning_lora.model.summary import summary
from lightning_lora.nn.chunked_cross_entropy import chunked_cross_entropy
from lightning_lora.nn.dora import DoRAConfig
from lightning_lora.nn.lora import LoRAConfig
from lightning_lora.nn.lora_fa import LoRAFAConfig
from lightning_lora.nn.parameters_on_meta import parameters_on_meta
from lightning_lora.nn.vera import VeRAConfig
from lightning_lora.optim.badam import BAdam
from lightning_lora.optim.galore_adamw import GaLore
from lightning_lora.optim.lora_plus import param_groups
from lightning_lora.quantization import adopt as _adopt  # noqa: F401 (registers bitsandbytes' layers as bases)
from lightning_lora.quantization.config import FP4Config, Int8Config, NF2Config, NF3Config, NF4Config
from lightning_lora.quantization.quantize import quantize
from lightning_lora.strategies.lora import LoRADDPStrategy, LoRAStrategy
from lightning_lora.version import __version__

if TYPE_CHECKING:
    from lightning_lora.cli.lightning_cli import LoRACLI

__all__ = [
    "AdapterError",
    "AdapterMonitor",
    "BAdam",
    "CheckpointError",
    "DoRAConfig",
    "FP4Config",
    "GaLore",
    "GradientError",
    "Int8Config",
    "LoRACLI",
    "LoRACallback",
    "LoRAConfig",
    "LoRADDPStrategy",
    "LoRAError",
    "LoRAFAConfig",
    "LoRAStrategy",
    "LoadError",
    "MergeError",
    "NF2Config",
    "NF3Config",
    "NF4Config",
    "OptimizerError",
    "QuantizationError",
    "Setup",
    "TargetError",
    "UnsupportedError",
    "VeRAConfig",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state_dict",
    "chunked_cross_entropy",
    "combine",
    "delete_adapter",
    "disabled",
    "estimate",
    "export_merged",
    "initialize_eva",
    "inject",
    "load_adapter",
    "load_adapters",
    "load_base",
    "load_from_checkpoint",
    "load_quantized",
    "merge",
    "param_groups",
    "parameters_on_meta",
    "pull_adapter",
    "push_adapter",
    "quantize",
    "routed",
    "save_adapter",
    "save_adapters",
    "save_quantized",
    "summary",
]


def __getattr__(name: str) -> Any:
    """Import ``LoRACLI`` when it is asked for: its import loads jsonargparse and sets how that reads files."""
    if name == "LoRACLI":
        from lightning_lora.cli.lightning_cli import LoRACLI

        return LoRACLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
