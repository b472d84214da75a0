"""What each method computes, as the weight ``(O, I)`` its paper writes down, in full and without any economy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_lora.nn.adapter import AdapterConfig

Tensors = Mapping[str, Tensor]


def lora(W: Tensor, t: Tensors, config: AdapterConfig) -> Tensor:
    """arXiv 2106.09685, equation 3, for each of a stack of weights too.

    An adapter that starts in the weight (PiSSA, arXiv 2404.02948, equation 5) trains ``A`` and ``B`` over
    ``W - s B0 A0``, which is what ``W`` is here already where it was quantized so.
    """
    s = config.alpha / config.r
    residual = W - s * t["lora_B0"] @ t["lora_A0"] if "lora_A0" in t and "taken_A" not in t else W
    return residual + s * t["lora_B"] @ t["lora_A"]


def dora(W: Tensor, t: Tensors, config: AdapterConfig) -> Tensor:
    """arXiv 2402.09353, equation 5 with the norm held constant (section 4.3)."""
    V = lora(W, t, config)
    return t["lora_magnitude_vector"].unsqueeze(1) * V / V.detach().norm(dim=1, keepdim=True)


def vera(W: Tensor, t: Tensors, config: AdapterConfig) -> Tensor:
    """arXiv 2310.11454, equation 2."""
    return W + t["vera_lambda_b"].diag() @ t["vera_B"] @ t["vera_lambda_d"].diag() @ t["vera_A"]


FORMULAS: dict[str, Callable[[Tensor, Tensors, AdapterConfig], Tensor]] = {
    "lora": lora,
    "dora": dora,
    "lora_fa": lora,  # arXiv 2308.03303: the same function, of which A is not trained
    "vera": vera,
}
