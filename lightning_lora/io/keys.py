"""Names and shapes of tensors on disk, in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_lora.nn.conv import ConvKind
from lightning_lora.nn.experts import ExpertsKind
from lightning_lora.nn.kind import Kind

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_MATRICES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_FACTORS: Mapping[str, Mapping[str, str]] = {
    "linear": _MATRICES,
    "conv": _MATRICES,
    "experts": _MATRICES,
    "embedding": {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
}
_MAGNITUDE = {"lora_magnitude_vector": "lora_magnitude_vector"}
_VECTORS = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
_LEAVES = sorted({leaf for names in (*_FACTORS.values(), _MAGNITUDE, _VECTORS) for leaf in names.values()})


def canonical(path: str) -> str:
    """Strip what ``torch.compile`` puts into module names, so that a file does not depend on it."""
    return path.replace(_COMPILED, "")


def leaves(kind: Kind, method: str = "lora") -> Mapping[str, str]:
    """On-disk names, within its layer, of the tensors of a method's adapter over a kind of layer."""
    return leaves_over(kind.name, method)


def leaves_over(kind: str, method: str) -> Mapping[str, str]:
    """The same for the name of a kind."""
    if method == "vera":
        return _VECTORS
    return {**_FACTORS[kind], **_MAGNITUDE} if method == "dora" else _FACTORS[kind]


def by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors as its parameters have them, from those of one layer by their on-disk names."""
    names = {leaf: key for leaves in (*_FACTORS.values(), _MAGNITUDE, _VECTORS) for key, leaf in leaves.items()}
    own = {names[leaf]: tensor for leaf, tensor in tensors.items()}
    return {key: tensor.flatten(1 if key in _MATRICES else 0) for key, tensor in own.items()}


def adapter_key(path: str, leaf: str) -> str:
    """On-disk name of an adapter tensor: ``base_model.model.<layer>.lora_A.weight``."""
    return f"{PREFIX}{canonical(path)}.{leaf}"


def trained_key(name: str) -> str:
    """On-disk name of a tensor of a module trained whole: ``base_model.model.<name>``."""
    return f"{PREFIX}{canonical(name)}"


def split_adapter_key(key: str) -> tuple[str, str] | None:
    """Inverse of :func:`adapter_key`: ``(layer, leaf)``, or None if ``key`` is no adapter tensor."""
    for leaf in _LEAVES:
        if key.startswith(PREFIX) and key.endswith(f".{leaf}"):
            return key[len(PREFIX) : -len(leaf) - 1], leaf
    return None


def shape_on_disk(kind: Kind, tensor: str, r: int) -> tuple[int, ...]:
    """Shape of an adapter's tensor of rank ``r`` in a file: over a convolution, factors are kernels of one."""
    ones = (1,) * kind.axes if isinstance(kind, ConvKind) else ()
    stack = (kind.experts,) if isinstance(kind, ExpertsKind) else ()  # as io.experts has unpacked it
    shapes = {
        "lora_A": (r, *kind.kernel) if isinstance(kind, ConvKind) else (*stack, r, kind.in_features),
        "lora_B": (*stack, kind.out_features, r, *ones),
        "lora_magnitude_vector": (1, kind.out_features, *ones) if ones else (kind.out_features,),
        "vera_lambda_b": (kind.out_features,),
        "vera_lambda_d": (r,),
    }
    return shapes[tensor]
