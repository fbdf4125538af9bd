"""The functions that an expression may call, each a function of one sample's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _each(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function under a signature of its own: torch's builtins have none."""

    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def _sum(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return x.sum(dim=dim, keepdim=keepdim)


def _mean(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return x.mean(dim=dim, keepdim=keepdim)


def _prod(x: Tensor, dim: int | None = None) -> Tensor:
    return x.prod() if dim is None else x.prod(dim=dim)


def _norm(x: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return norm


def _max(x: Tensor, other: Tensor | None = None, dim: int | None = None) -> Tensor:
    if other is not None:
        return torch.maximum(x, other)
    return x.amax() if dim is None else x.amax(dim=dim)


def _min(x: Tensor, other: Tensor | None = None, dim: int | None = None) -> Tensor:
    if other is not None:
        return torch.minimum(x, other)
    return x.amin() if dim is None else x.amin(dim=dim)


def _softmax(x: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(x, dim=dim)


def _log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    return torch.log_softmax(x, dim=dim)


def _logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    return torch.logsumexp(x, dim=dim)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return torch.outer(x, y)


def _stack(*parts: Tensor, dim: int = 0) -> Tensor:
    return torch.stack(_spread(parts), dim=dim)


def _cat(*parts: Tensor, dim: int = 0) -> Tensor:
    return torch.cat([p.reshape(1) if p.dim() == 0 else p for p in _spread(parts)], dim=dim)


def _spread(parts: Sequence[Any]) -> list[Any]:
    return list(parts[0]) if len(parts) == 1 and isinstance(parts[0], list) else list(parts)


def _reshape(x: Tensor, *shape: Any) -> Tensor:
    return x.reshape([int(n) for n in _spread(shape)])


def _flatten(x: Tensor) -> Tensor:
    return x.reshape(-1)


def _transpose(x: Tensor, first: int = 0, second: int = 1) -> Tensor:
    return x.transpose(first, second)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return x.clamp(low, high)


def _pow(x: Tensor, y: Any) -> Tensor:
    return torch.pow(x, y)


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "sign": torch.sign, "square": torch.square, "sqrt": torch.sqrt,
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p,
    "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan,
    "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "erf": torch.erf,
    "sigmoid": torch.sigmoid, "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu,
    "softplus": functional.softplus,
}  # fmt: skip

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    **{name: _each(function) for name, function in _ELEMENTWISE.items()},
    "sum": _sum, "mean": _mean, "prod": _prod, "norm": _norm, "max": _max, "min": _min,
    "softmax": _softmax, "log_softmax": _log_softmax, "logsumexp": _logsumexp,
    "matmul": _matmul, "dot": _dot, "outer": _outer, "stack": _stack, "cat": _cat, "reshape": _reshape,
    "flatten": _flatten, "transpose": _transpose, "where": _where, "clamp": _clamp, "pow": _pow,
}  # fmt: skip


def call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], like: Tensor) -> Tensor:
    """Call a function by name; numbers that stand where it wants tensors become tensors like `like`."""
    function = FUNCTIONS[name]
    bound = inspect.signature(function).bind(*args, **kwargs)
    parameters = inspect.signature(function).parameters
    for key, value in bound.arguments.items():
        if str(parameters[key].annotation).startswith("Tensor"):
            bound.arguments[key] = _tensors(value, like)
    return function(*bound.args, **bound.kwargs)


def _tensors(value: Any, like: Tensor) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_tensors(part, like) for part in value)
    if isinstance(value, int | float):
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return torch.full((), value, dtype=dtype, device=like.device)
    return value
