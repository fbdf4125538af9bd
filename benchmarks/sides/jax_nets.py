"""The benchmark's nets in JAX, on the very weights of the torch modules; one function of one sample each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from torch import Tensor, nn

from benchmarks.nets import Block, LanguageModel, Sentences, SquareSums, TwoLayers
from benchmarks.task import CannotError

Values = dict[str, Any]
Net = Callable[[Values, Any], Any]


def weights(model: nn.Module) -> Values:
    """Parameters and buffers by name as JAX arrays."""
    return {name: jnp.asarray(t.detach().cpu().numpy()) for name, t in model.state_dict().items()}


def net(model: nn.Module) -> Net:
    """`(values, point) -> (*out)` for one sample.

    Raises:
        CannotError: the net was not written in JAX.
    """
    if isinstance(model, nn.Sequential):
        return lambda w, x: _sequential(model, "", w, x)
    if isinstance(model, Block):
        return _block
    if isinstance(model, LanguageModel):
        return _language
    if isinstance(model, Sentences):
        config = model.bert.config
        return lambda w, e: _sentences(w, e, config.num_hidden_layers, config.num_attention_heads)
    if isinstance(model, TwoLayers):
        return lambda w, x: _linear(w, "second", jnp.tanh(_linear(w, "first", x)))
    if isinstance(model, SquareSums):
        return lambda _, x: (x**2).sum()
    raise CannotError(f"{type(model).__name__} was not written in JAX")


def _linear(w: Values, name: str, x: Any) -> Any:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: Values, name: str, x: Any, eps: float = 1e-5) -> Any:
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _convolved(layer: nn.Conv2d, w: Values, name: str, x: Any) -> Any:
    """`(C, H, W)` to `(C', H', W')`."""
    pad = [(p, p) for p in layer.padding]
    y = lax.conv_general_dilated(
        x[None], w[f"{name}.weight"], layer.stride, pad, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )[0]
    return y + w[f"{name}.bias"][:, None, None]


def _sequential(model: nn.Sequential, prefix: str, w: Values, x: Any) -> Any:
    for key, layer in model.named_children():
        name = f"{prefix}{key}"
        if isinstance(layer, nn.Sequential):
            x = _sequential(layer, f"{name}.", w, x)
        elif isinstance(layer, nn.Linear):
            x = _linear(w, name, x)
        elif isinstance(layer, nn.Conv2d):
            x = _convolved(layer, w, name, x)
        elif isinstance(layer, nn.ReLU):
            x = jax.nn.relu(x)
        elif isinstance(layer, nn.Tanh):
            x = jnp.tanh(x)
        elif isinstance(layer, nn.Flatten):
            x = x.reshape(-1)
        else:
            raise CannotError(f"{type(layer).__name__} was not written in JAX")
    return x


def _heads(x: Any, heads: int) -> Any:
    """`(T, d)` to `(heads, T, d / heads)`."""
    return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)


def _attention(q: Any, k: Any, v: Any, heads: int, mask: Any = 0.0) -> Any:
    """`(T, d)` each to `(T, d)`."""
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    scores = q @ k.transpose(0, 2, 1) / jnp.sqrt(q.shape[-1]) + mask
    mixed = jax.nn.softmax(scores, -1) @ v
    return mixed.transpose(1, 0, 2).reshape(q.shape[1], -1)


def _encoder(w: Values, name: str, x: Any, mask: Any = 0.0, heads: int = 4) -> Any:
    """A TransformerEncoderLayer of torch's with the norm first."""
    h = _norm(w, f"{name}.norm1", x)
    qkv = h @ w[f"{name}.self_attn.in_proj_weight"].T + w[f"{name}.self_attn.in_proj_bias"]
    x = x + _linear(w, f"{name}.self_attn.out_proj", _attention(*jnp.split(qkv, 3, -1), heads, mask))
    h = _norm(w, f"{name}.norm2", x)
    return x + _linear(w, f"{name}.linear2", jax.nn.relu(_linear(w, f"{name}.linear1", h)))


def _block(w: Values, x: Any) -> Any:
    return _linear(w, "head", _encoder(w, "layer", x).mean(0))


def _language(w: Values, e: Any) -> Any:
    for i in range(2):
        e = _encoder(w, f"layers.layers.{i}", e, w["mask"])
    return _linear(w, "head", e[-1])


def _sentences(w: Values, e: Any, layers: int, heads: int) -> Any:
    """BERT from its word embeddings, the mean over tokens, length one."""
    base = "bert.embeddings"
    where = w[f"{base}.position_embeddings.weight"][: e.shape[0]]
    x = _norm(w, f"{base}.LayerNorm", e + where + w[f"{base}.token_type_embeddings.weight"][0], 1e-12)
    for i in range(layers):
        name = f"bert.encoder.layer.{i}"
        q, k, v = (_linear(w, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = _linear(w, f"{name}.attention.output.dense", _attention(q, k, v, heads))
        x = _norm(w, f"{name}.attention.output.LayerNorm", x + mixed, 1e-12)
        h = jax.nn.gelu(_linear(w, f"{name}.intermediate.dense", x), approximate=False)
        x = _norm(w, f"{name}.output.LayerNorm", x + _linear(w, f"{name}.output.dense", h), 1e-12)
    pooled = x.mean(0)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled), 1e-12)


def tensor(array: Any) -> Tensor:
    """A JAX array as a torch tensor."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array))
