"""Operators that turn a packed weight into a dense one: how each is made known to torch, once.

An operator is a schema, an implementation for CPU and CUDA, and what it gives without values. All of them take what a
:class:`~lightning_lora.kernels.packed.Packed` holds, and return a tensor of the ``shape`` and ``dtype`` that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lora.kernels.packed import Packed

_LIBRARY: Any = torch.library.Library("lightning_lora", "FRAGMENT")  # type: ignore[no-untyped-call]
_PACKED = "Tensor codes, Tensor absmax, Tensor nested_absmax, Tensor offset, int block_size"
_COUNT = len(Packed._fields)


def define(name: str, arguments: str, compute: Callable[..., Tensor], check: Callable[..., None]) -> Any:
    """Define ``lightning_lora::name`` and return what calls it.

    By schema and not by ``torch.library.custom_op``, whose every call costs several microseconds of Python more.

    Args:
        name: Of the operator.
        arguments: What follows the packed weight, as in a schema; the first two are ``shape`` and ``dtype``.
        compute: Of a packed weight with ``float32`` constants and the arguments.
        check: Raises ``RuntimeError`` unless they fit together; called before ``compute``, with the same.
    """

    def real(*given: Any) -> Tensor:
        packed, rest = Packed(*given[:_COUNT]).as_floats(), given[_COUNT:]
        check(packed, *rest)
        return compute(packed, *rest)

    def fake(*given: Any) -> Tensor:
        packed, rest = Packed(*given[:_COUNT]), given[_COUNT:]
        check(packed, *rest)
        shape, dtype, *_ = rest
        return torch.empty(shape, dtype=dtype, device=packed.codes.device)

    _LIBRARY.define(f"{name}({_PACKED}, {arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, real, device)
    torch.library.register_fake(f"lightning_lora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lightning_lora, name).default
