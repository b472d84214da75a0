"""``nn.MultiheadAttention`` with its projections as layers of their own, each of which can hold adapters.

torch's module reads its weights without calling a layer, and packs three of them into one. ``SplitAttention`` stands in
its place while one of them is adapted and computes the same with ordinary linear layers; :meth:`SplitAttention.joined`
gives torch's module back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_lora.nn.base import QuantizedLinear, dense_weight, layer_bias, weight_dtype
from lightning_lora.nn.split import Split

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The linear layers of an attention, named as torch names their weights."""

_PARAMETERS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"}


class SplitAttention(Split):
    """``softmax(q k^T / sqrt(D) + mask) v``, projected, with ``q``, ``k``, ``v`` from linear layers that are called.

    Shapes: ``N`` batch, ``L`` queries, ``S`` keys, ``H`` heads of ``D`` features, ``E = H D``. Everything that can be
    read from ``nn.MultiheadAttention`` can be read here: ``in_proj_weight`` and its like are the merged weights, for
    torch's fused encoder layer reads them in evaluation.

    Args:
        source: The module to stand for, left as it is. The projections are frozen views of its weights until
            :meth:`own_memory`.

    Attributes:
        q_proj: ``(E) -> (E)``; a ``nn.Linear``, quantized or adapted, as are the next three.
        k_proj: ``(kdim) -> (E)``.
        v_proj: ``(vdim) -> (E)``.
        out_proj: ``(E) -> (E)``.
        bias_k: A further key of shape ``(1, 1, E)``, or None.
        bias_v: Its value.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self._qkv_same_embed_dim = source._qkv_same_embed_dim
        self._shell = (_emptied(source),)  # in a tuple, so that it does not become a child
        held: Mapping[str, Any] = dict(source.named_parameters())
        packed, bias = held.get("in_proj_weight"), held.get("in_proj_bias")
        weights = [held[f"{name}_weight"] for name in PROJECTIONS[:3]] if packed is None else _thirds(packed)
        biases = [None] * 3 if bias is None else _thirds(bias)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(held["out_proj.weight"], held.get("out_proj.bias"))
        self.register_parameter("bias_k", held.get("bias_k"))
        self.register_parameter("bias_v", held.get("bias_v"))
        self.train(source.training)

    def parts(self) -> dict[str, nn.Module]:
        """The four projections."""
        return {name: self.get_submodule(name) for name in PROJECTIONS}

    def own_memory(self) -> None:
        """Copy what views a packed tensor, so that the memory of each projection can be freed by itself."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name == "bias" or self._qkv_same_embed_dim:
                    layer.register_parameter(name, _frozen(parameter.detach().clone()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what ``nn.MultiheadAttention`` does; arguments and results are the same.

        Raises:
            ValueError: If ``is_causal`` comes without ``attn_mask``, or a mask is of another shape or dtype than torch
                takes.
            TypeError: For nested tensors.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                "an attention with adapters takes nested tensors only inside the fused evaluation of "
                "nn.TransformerEncoder, which needs torch.no_grad() in eval() mode. Build the encoder with "
                "enable_nested_tensor=False to do without"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is None; pass the causal mask too")
        batched = query.dim() == 3
        q, k, v = (
            self._heads(layer(x), batched)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        sizes = (*q.shape[:3], k.shape[2])
        k, v = self._lengthened(k, self.bias_k), self._lengthened(v, self.bias_v)
        hinted = is_causal and key_padding_mask is None and not need_weights
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = _mask_of(None if hinted else attn_mask, key_padding_mask, sizes, k.shape[2] - sizes[3], query.dtype)
        weights = None
        p = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, p) if p > 0 else weights
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, p, hinted)
        output: Tensor = self.out_proj(self._features(heads, batched))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return output, weights

    merge_masks = nn.MultiheadAttention.merge_masks

    @torch.no_grad()
    def joined(
        self, layers: Mapping[str, nn.Module] | None = None, *, dtype: torch.dtype | None = None
    ) -> nn.MultiheadAttention:
        """Return torch's module with the weights of ``layers``; ``self`` is left as it is.

        Args:
            layers: A plain or quantized layer for each of the projections; None takes those that are here.
            dtype: What to store the weights in; None keeps what they are in.
        """
        layers = self.parts() if layers is None else layers
        plain = _copied(self._shell[0])
        q, k, v, out = (dense_weight(layers[name], dtype or weight_dtype(layers[name])) for name in PROJECTIONS)
        if self._qkv_same_embed_dim:
            plain.in_proj_weight = _frozen(torch.cat([q, k, v]))
        else:
            plain.q_proj_weight, plain.k_proj_weight, plain.v_proj_weight = _frozen(q), _frozen(k), _frozen(v)
        biases = [layer_bias(layers[name]) for name in PROJECTIONS[:3]]
        if biases[0] is not None:
            plain.in_proj_bias = _frozen(torch.cat([b.to(dtype or b.dtype) for b in biases if b is not None]))
        if self.bias_k is not None:  # else torch has no parameters of these names, but attributes
            plain.bias_k, plain.bias_v = _stored(self.bias_k, dtype), _stored(self.bias_v, dtype)
        weight = dict(layers["out_proj"].named_parameters(recurse=False)).get("weight")
        plain.out_proj.weight = _frozen(out) if weight is None or weight.dtype != out.dtype else weight
        plain.out_proj.register_parameter("bias", _stored(layer_bias(layers["out_proj"]), dtype))
        return plain.train(self.training)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The merged weights of ``q``, ``k`` and ``v`` of shape ``(3 E, E)``; None where their inputs differ in size.

        Computed anew on each access, with gradients to the adapters.
        """
        if not self._qkv_same_embed_dim:
            return None
        return torch.cat([_weight(layer) for layer in (self.q_proj, self.k_proj, self.v_proj)])

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The merged weight of ``q``; None where it is part of :attr:`in_proj_weight`."""
        return None if self._qkv_same_embed_dim else _weight(self.q_proj)

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The merged weight of ``k``; None where it is part of :attr:`in_proj_weight`."""
        return None if self._qkv_same_embed_dim else _weight(self.k_proj)

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The merged weight of ``v``; None where it is part of :attr:`in_proj_weight`."""
        return None if self._qkv_same_embed_dim else _weight(self.v_proj)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of ``q``, ``k`` and ``v`` of shape ``(3 E,)``, or None."""
        biases = [_bias(layer) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        present = [bias for bias in biases if bias is not None]
        return torch.cat(present) if present else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            shell = vars(self).get("_shell")
            if shell is None or name in _PARAMETERS:
                raise
            return getattr(shell[0], name)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"

    def _heads(self, y: Tensor, batched: bool) -> Tensor:
        """Turn a projection into ``(N, H, L, D)``."""
        y = y if batched else y.unsqueeze(0)
        y = y if self.batch_first or not batched else y.transpose(0, 1)
        return y.view(*y.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _features(self, heads: Tensor, batched: bool) -> Tensor:
        """Inverse of :meth:`_heads`."""
        if not batched:
            return heads.squeeze(0).transpose(0, 1).flatten(1)
        return heads.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(2)

    def _lengthened(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Append to keys or values what ``add_bias_kv`` and ``add_zero_attn`` ask for."""
        if bias is not None:
            more = bias.view(1, self.num_heads, 1, -1).expand(len(heads), -1, -1, -1)
            heads = torch.cat([heads, more], dim=2)
        return F.pad(heads, (0, 0, 0, 1)) if self.add_zero_attn else heads


def why_not_splittable(layer: nn.MultiheadAttention) -> str | None:
    """Say why no :class:`SplitAttention` can stand for ``layer``, or return None where one can."""
    name = type(layer).__name__
    if type(layer).forward is not nn.MultiheadAttention.forward:
        return f"{name} overrides nn.MultiheadAttention.forward"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(layer) or parametrize.is_parametrized(layer.out_proj):
        return "its weights are parametrized (torch.nn.utils.parametrize)"
    if set(layer._modules) != {"out_proj"} or layer._buffers or not set(layer._parameters) <= _PARAMETERS:
        return f"{name} holds more than the weights of nn.MultiheadAttention"
    if not isinstance(layer.out_proj, nn.Linear) or "weight" not in layer.out_proj._parameters:
        return f"its out_proj is a {type(layer.out_proj).__name__}"
    if any(vars(layer).get(parameter) is not None for parameter in _PARAMETERS):
        return "its weights were replaced by plain tensors"
    return None


def _mask_of(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, ...],
    more: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return what to add to the scores, broadcastable to ``(N, H, L, S + more)``; the ``more`` last keys are seen."""
    n, h, queries, keys = sizes
    found = []
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, [(queries, keys), (n * h, queries, keys)])
        shape = (1, 1, queries, keys) if attn_mask.dim() == 2 else sizes
        found.append(_additive(attn_mask, dtype).view(shape))
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(n, keys)])
        found.append(_additive(key_padding_mask, dtype).view(-1, 1, 1, keys))
    return F.pad(sum(found[1:], found[0]), (0, more)) if found else None


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, expected bool or floats of shape "
            f"{' or '.join(map(str, shapes))}"
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as ``-inf`` where it is true."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask


def _emptied(source: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A copy without weights: class, settings, hooks and the order of the keys."""
    shell = _copied(source)
    for module in (shell, shell.out_proj):
        module._parameters = dict.fromkeys(module._parameters)
    return shell


def _copied(source: nn.MultiheadAttention) -> nn.MultiheadAttention:
    plain, out = copy.copy(source), copy.copy(source.out_proj)
    for module in (plain, out):  # a shallow copy shares these dicts
        module._parameters, module._modules = dict(module._parameters), dict(module._modules)
    plain._modules["out_proj"] = out
    return plain


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _thirds(packed: nn.Parameter) -> list[nn.Parameter]:
    return [_frozen(part) for part in packed.detach().chunk(3)]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.dequantize(layer.merge_dtype) if isinstance(layer, QuantizedLinear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _stored(parameter: nn.Parameter | None, dtype: torch.dtype | None) -> nn.Parameter | None:
    if parameter is None or dtype in (None, parameter.dtype):
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
