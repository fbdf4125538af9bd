"""Attention written out: its projections become linear calls of their own, its middle runs on the unfused kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacray_workers.sharing import math_attention

_ARGUMENTS = (
    "query", "key", "value", "embed_dim", "heads", "in_weight", "in_bias", "bias_k", "bias_v", "add_zero_attn",
    "dropout_p", "out_weight", "out_bias", "training", "key_padding_mask", "need_weights", "attn_mask",
    "use_separate_proj_weight", "q_weight", "k_weight", "v_weight", "static_k", "static_v", "average_attn_weights",
    "is_causal",
)  # fmt: skip
_NAMES = {
    "embed_dim_to_check": "embed_dim", "num_heads": "heads", "in_proj_weight": "in_weight", "in_proj_bias": "in_bias",
    "out_proj_weight": "out_weight", "out_proj_bias": "out_bias", "q_proj_weight": "q_weight",
    "k_proj_weight": "k_weight", "v_proj_weight": "v_weight",
}  # fmt: skip
_DEFAULTS = {
    "training": True, "need_weights": True, "average_attn_weights": True, "use_separate_proj_weight": False,
    "is_causal": False,
}  # fmt: skip


def dot_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
    """Scaled dot-product attention on the unfused kernel, whose parts all have batching rules on the way back."""
    known = getattr(mode, "known", {})
    if any(id(t) in known for t in (*args, *kwargs.values())):
        return NotImplemented
    with math_attention():
        return func(*args, **kwargs)


def multi_head(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
    """`F.multi_head_attention_forward` on `(length, batch, features)`."""
    del func
    given = dict(zip(_ARGUMENTS, args, strict=False))
    given |= {_NAMES.get(name, name): value for name, value in kwargs.items()}
    call = {**dict.fromkeys(_ARGUMENTS), **_DEFAULTS, **given}
    if call["query"].dim() != 3 or not set(call) <= set(_ARGUMENTS):
        return NotImplemented
    with mode:
        return _attend(call)


def _attend(call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    length, batch, width = call["query"].shape
    heads = call["heads"]
    q, k, v = _projected(call)
    mask = _float_mask(call["attn_mask"], q.dtype)
    padding = _float_mask(call["key_padding_mask"], q.dtype)
    if call["bias_k"] is not None:
        k = torch.cat([k, call["bias_k"].expand(1, batch, -1)])
        v = torch.cat([v, call["bias_v"].expand(1, batch, -1)])
        mask, padding = _longer(mask), _longer(padding)
    q = _heads(q, heads)
    k = _heads(k, heads) if call["static_k"] is None else call["static_k"].unflatten(0, (batch, heads))
    v = _heads(v, heads) if call["static_v"] is None else call["static_v"].unflatten(0, (batch, heads))
    if call["add_zero_attn"]:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask, padding = _longer(mask), _longer(padding)
    bias = _merged(mask, padding, batch, heads)
    dropout = call["dropout_p"] if call["training"] else 0.0
    if not call["need_weights"]:
        mixed, weights = F.scaled_dot_product_attention(q, k, v, bias, dropout), None
    else:
        scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.mT
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        mixed = weights @ v
        weights = weights.mean(dim=1) if call["average_attn_weights"] else weights
    joined = mixed.permute(2, 0, 1, 3).reshape(length, batch, width)
    return F.linear(joined, call["out_weight"], call["out_bias"]), weights


def _projected(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; one product serves those that share their input and a packed weight."""
    q, k, v = call["query"], call["key"], call["value"]
    weight, bias = call["in_weight"], call["in_bias"]
    if not call["use_separate_proj_weight"] and q is k and k is v:
        parts = F.linear(q, weight, bias).chunk(3, dim=-1)
        return parts[0], parts[1], parts[2]
    if call["use_separate_proj_weight"]:
        weights = (call["q_weight"], call["k_weight"], call["v_weight"])
    else:
        weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    return q, k, v


def _heads(t: Tensor, heads: int) -> Tensor:
    """`(length, batch, features)` as `(batch, heads, length, features of one head)`."""
    return t.view(*t.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add: minus infinity where a boolean one forbids."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _longer(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))


def _merged(mask: Tensor | None, padding: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """One mask to add to `(batch, heads, length, keys)`."""
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, heads))
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding
