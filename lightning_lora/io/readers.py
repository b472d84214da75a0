"""What programs other than PEFT and this one cannot take of an adapter folder, said when it is written.

vLLM (``vllm/lora/peft_helper.py``) and llama.cpp (``convert_lora_to_gguf.py``) serve adapters. Both read one rank, one
alpha and pairs of factors; what goes beyond, they refuse, or scale as if it were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_VLLM_MAX_RANK = 16
"""The largest rank vLLM takes unless told otherwise."""

Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def limits(settings: Settings, tensors: Tensors) -> list[str]:
    """Return a line for each reader that cannot take an adapter as it is: its name, and what it cannot take.

    Args:
        settings: ``adapter_config.json``.
        tensors: The tensors by their on-disk names.
    """
    lines = []
    for reader, cannot in (("vLLM", _not_for_vllm), ("llama.cpp (GGUF)", _not_for_llama_cpp)):
        found = [what for what, there in cannot(settings, tensors).items() if there]
        if found:
            lines.append(f"{reader} cannot take {'; '.join(found)}. Give it merged weights: merge(model), and save it")
    return lines


def _not_for_vllm(settings: Settings, tensors: Tensors) -> dict[str, bool]:
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    return {
        **_not_for_servers(settings, tensors),
        "modules_to_save": bool(settings["modules_to_save"]),
        f"{' and '.join(patterns)} (it scales every layer alike)": bool(patterns),
        f"r={settings['r']} unless started with --max-lora-rank {settings['r']}": settings["r"] > _VLLM_MAX_RANK,
    }


def _not_for_llama_cpp(settings: Settings, tensors: Tensors) -> dict[str, bool]:
    whole = settings["modules_to_save"] or []
    return {
        **_not_for_servers(settings, tensors),
        "modules_to_save beyond norms": any("norm" not in name.rpartition(".")[2] for name in whole),
        "adapters on embeddings": any("lora_embedding" in key for key in tensors),
        "rsLoRA (it would scale by alpha / r)": bool(settings.get("use_rslora")),
        "alpha_pattern (it takes one alpha for every layer)": bool(settings.get("alpha_pattern")),
    }


def _not_for_servers(settings: Settings, tensors: Tensors) -> dict[str, bool]:
    factors = {key: tensor for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    return {
        "VeRA": settings["peft_type"] == "VERA",
        "DoRA": bool(settings.get("use_dora")),
        f"bias={settings['bias']!r}": settings["bias"] != "none",
        "adapters on convolutions": any(tensor.dim() > 2 for tensor in factors.values()),
        "adapters on nn.MultiheadAttention": any(".base_layer.out_proj." in key for key in factors),
    }
