"""Names and shapes of tensors on disk, in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_lora.nn.conv import ConvKind
from lightning_lora.nn.experts import ExpertsKind
from lightning_lora.nn.kind import Kind

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_WEIGHTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_LEAVES: Mapping[str, Mapping[str, str]] = {
    "linear": _WEIGHTS,
    "conv": _WEIGHTS,
    "experts": _WEIGHTS,
    "embedding": {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
}


def canonical(path: str) -> str:
    """Strip what ``torch.compile`` puts into module names, so that a file does not depend on it."""
    return path.replace(_COMPILED, "")


def leaves(kind: Kind) -> Mapping[str, str]:
    """On-disk names, within its layer, of an adapter's tensors over a kind of layer."""
    return _LEAVES[kind.name]


def adapter_key(path: str, leaf: str) -> str:
    """On-disk name of an adapter tensor: ``base_model.model.<layer>.lora_A.weight``."""
    return f"{PREFIX}{canonical(path)}.{leaf}"


def trained_key(name: str) -> str:
    """On-disk name of a tensor of a module trained whole: ``base_model.model.<name>``."""
    return f"{PREFIX}{canonical(name)}"


def split_adapter_key(key: str) -> tuple[str, str] | None:
    """Inverse of :func:`adapter_key`: ``(layer, leaf)``, or None if ``key`` is no adapter tensor."""
    for leaf in dict.fromkeys(leaf for names in _LEAVES.values() for leaf in names.values()):
        if key.startswith(PREFIX) and key.endswith(f".{leaf}"):
            return key[len(PREFIX) : -len(leaf) - 1], leaf
    return None


def shape_on_disk(kind: Kind, tensor: str, r: int) -> tuple[int, ...]:
    """Shape of ``lora_A`` or ``lora_B`` of rank ``r`` in a file: a matrix, the kernels of a convolution, or a stack."""
    if isinstance(kind, ExpertsKind):  # as io.experts has unpacked it
        return (kind.experts, r, kind.in_features) if tensor == "lora_A" else (kind.experts, kind.out_features, r)
    if isinstance(kind, ConvKind):
        return (r, *kind.kernel) if tensor == "lora_A" else (kind.out_features, r, *(1,) * kind.axes)
    return (r, kind.in_features) if tensor == "lora_A" else (kind.out_features, r)
