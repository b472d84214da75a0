"""Names of tensors on disk, in PEFT's format: pure maps between strings."""

from __future__ import annotations

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def canonical(path: str) -> str:
    """Strip what ``torch.compile`` puts into module names, so that a file does not depend on it."""
    return path.replace(_COMPILED, "")


def adapter_key(path: str, tensor: str) -> str:
    """On-disk name of an adapter tensor: ``base_model.model.<layer>.lora_A.weight``."""
    return f"{PREFIX}{canonical(path)}.{_LEAVES[tensor]}"


def trained_key(name: str) -> str:
    """On-disk name of a tensor of a module trained whole: ``base_model.model.<name>``."""
    return f"{PREFIX}{canonical(name)}"


def split_adapter_key(key: str) -> tuple[str, str] | None:
    """Inverse of :func:`adapter_key`: ``(layer, tensor)``, or None if ``key`` is no adapter tensor."""
    for tensor, leaf in _LEAVES.items():
        if key.startswith(PREFIX) and key.endswith(f".{leaf}"):
            return key[len(PREFIX) : -len(leaf) - 1], tensor
    return None
