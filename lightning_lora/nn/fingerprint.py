"""The fingerprint of a weight: its shape, its dtype and SHA-256 over its bytes.

Hashing takes one to two seconds for a gigabyte and a core, so what is hashed whole is remembered for as long as the
weight lives, and of larger models a sample is hashed. Whoever compares two fingerprints uses what both have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

WHOLE_UP_TO = 2 * 2**30
"""Weights of at most this many bytes together are hashed whole; of more, each is sampled."""

DENSE = "dense"

_SAMPLES, _SAMPLE_BYTES = 16, 2**16
_PIECE_BYTES = 2**26  # copied from a GPU at once
_THREADS = 4


@dataclass(frozen=True)
class Fingerprint:
    """What tells one weight from another.

    Attributes:
        shape: As the layer stores it.
        dtype: Of the elements: ``float32``.
        sampled: SHA-256 of 16 pieces of 64 KiB spread evenly from the first byte to the last; of a weight of at most
            1 MiB, of all bytes.
        whole: SHA-256 of all bytes, or None where the model is too large.
        stored: ``"dense"``; or how the weight was stored where only its packed form was ever seen.
    """

    shape: tuple[int, ...]
    dtype: str
    sampled: str
    whole: str | None = None
    stored: str = DENSE

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a file."""
        return {key: list(value) if key == "shape" else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: If ``data`` is something else.
        """
        try:
            made = cls(**{**data, "shape": tuple(data["shape"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{data!r:.80} is no fingerprint of a weight ({error})") from None
        texts = (made.dtype, made.sampled, made.stored, made.whole or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(
            getattr(torch, made.dtype, 0), torch.dtype
        ):
            raise ValueError(f"{data!r:.80} is no fingerprint of a weight")
        return made

    def same_bytes(self, other: Fingerprint) -> bool:
        """Whether both are of the same bytes, as far as both know them."""
        if self.whole is not None and other.whole is not None:
            return self.whole == other.whole
        return self.sampled == other.sampled


def fingerprints(weights: Mapping[str, Tensor]) -> dict[str, Fingerprint]:
    """Take the fingerprint of each weight that is held whole by this process; the others are left out."""
    held = {name: weight for name, weight in weights.items() if is_held(weight)}
    whole = sum(weight.numel() * weight.element_size() for weight in held.values()) <= WHOLE_UP_TO
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:  # hashing lets other threads run
        taken = threads.map(lambda weight: fingerprint(weight, whole=whole), held.values())
        return dict(zip(held, taken, strict=True))


def fingerprint(weight: Tensor, *, whole: bool = True) -> Fingerprint:
    """Take the fingerprint of one weight, with a hash of all its bytes if ``whole``."""
    sampled = sample(weight)
    if weight.numel() * weight.element_size() <= _SAMPLES * _SAMPLE_BYTES:
        digest: str | None = sampled
    else:
        digest = _whole(weight, sampled) if whole else None
    return Fingerprint(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), sampled, digest)


@torch.no_grad()
def sample(*tensors: Tensor) -> str:
    """Return SHA-256 of an even sample of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        data = _bytes(tensor)
        last = len(data) - _SAMPLE_BYTES
        if len(data) > _SAMPLES * _SAMPLE_BYTES:
            starts = [index * last // (_SAMPLES - 1) for index in range(_SAMPLES)]
            data = torch.cat([data[start : start + _SAMPLE_BYTES] for start in starts])
        found.update(data.cpu().numpy().data)
    return found.hexdigest()


@torch.no_grad()
def sha256(*tensors: Tensor) -> str:
    """Return SHA-256 of all bytes of the tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        data = _bytes(tensor)
        for start in range(0, len(data), _PIECE_BYTES):
            found.update(data[start : start + _PIECE_BYTES].cpu().numpy().data)
    return found.hexdigest()


_known: MutableMapping[Tensor, tuple[Any, str]] = WeakIdKeyDictionary()
"""What has been hashed whole, by weight, with what told that it was this weight with these values."""


def _whole(weight: Tensor, sampled: str) -> str:
    # A cast to half precision and back may end at the same address with the same version; the sample tells.
    version = 0 if weight.is_inference() else weight._version
    key = (weight.data_ptr(), version, weight.dtype, sampled)
    known = _known.get(weight)
    if known is None or known[0] != key:
        known = _known[weight] = (key, sha256(weight))
    return known[1]


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8)


def is_held(weight: Tensor) -> bool:
    """Whether this process holds the weight's bytes: not so on the meta device and in a DTensor."""
    return not weight.is_meta and type(weight) in (Tensor, nn.Parameter)


def combined(found: Iterable[Fingerprint]) -> str:
    """Return a short name for several fingerprints: the first 12 digits of SHA-256 over them."""
    return hashlib.sha256("".join(sorted(each.whole or each.sampled for each in found)).encode()).hexdigest()[:12]
