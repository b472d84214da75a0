"""What programs other than PEFT and this one cannot take of an adapter folder, said when it is written.

vLLM (``vllm/lora/peft_helper.py``) and llama.cpp (``convert_lora_to_gguf.py``) serve adapters. Both read one rank, one
alpha and pairs of factors; what goes beyond, they refuse, or scale as if it were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

VLLM, LLAMA_CPP = "vLLM", "llama.cpp (GGUF)"
VLLM_RANK = 16
"""The largest rank vLLM takes unless told otherwise."""
_VLLM_LARGEST_RANK = 512

Settings = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def limits(settings: Settings, tensors: Tensors) -> list[str]:
    """Return a line for each reader that cannot take an adapter as it is: its name, and what it cannot take.

    Args:
        settings: ``adapter_config.json``.
        tensors: The tensors by their on-disk names.
    """
    found = obstacles(settings, tensors)
    rank = settings["r"]
    if rank > VLLM_RANK:
        found[VLLM].append(f"r={rank} unless started with --max-lora-rank {rank}")
    return [
        f"{reader} cannot take {'; '.join(cannot)}. Give it merged weights: merge(model), and save it"
        for reader, cannot in found.items()
        if cannot
    ]


def obstacles(settings: Settings, tensors: Tensors) -> dict[str, list[str]]:
    """Return, by reader, what of an adapter it cannot take, however it is started.

    Args:
        settings: ``adapter_config.json``, which may be another program's.
        tensors: The tensors by their on-disk names.
    """
    readers = {VLLM: _not_for_vllm, LLAMA_CPP: _not_for_llama_cpp}
    return {
        reader: [what for what, there in cannot(settings, tensors).items() if there]
        for reader, cannot in readers.items()
    }


def _not_for_vllm(settings: Settings, tensors: Tensors) -> dict[str, bool]:
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    return {
        **_not_for_servers(settings, tensors),
        "modules_to_save": bool(settings.get("modules_to_save")),
        f"{' and '.join(patterns)} (it scales every layer alike)": bool(patterns),
        f"r={settings['r']}": settings["r"] > _VLLM_LARGEST_RANK,
    }


def _not_for_llama_cpp(settings: Settings, tensors: Tensors) -> dict[str, bool]:
    whole = settings.get("modules_to_save") or []
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
        "VeRA": settings.get("peft_type") == "VERA",
        "DoRA": bool(settings.get("use_dora")),
        f"bias={settings.get('bias')!r}": (settings.get("bias") or "none") != "none",
        "adapters on convolutions": any(tensor.dim() > 2 for tensor in factors.values()),
        "adapters on stacks of experts": bool(settings.get("target_parameters")),
        "adapters on nn.MultiheadAttention": any(".base_layer.out_proj." in key for key in factors),
    }
