"""Functions of one number, as torch's modules: what each gives, and its slope there.

Slopes are torch's own backward for a cotangent of ones (`derivatives.yaml`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_aten: Any = torch.ops.aten
Value = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Curve:
    """One function.

    Attributes:
        value: module and numbers -> what the module gives.
        slope: module, numbers and values -> the derivative; of a gate the values, which are on where they are above 0.
        gate: the derivative is 1 where it is on, and elsewhere 0 whatever arrives there.
    """

    value: Value
    slope: Callable[[Any, Tensor, Tensor], Tensor]
    gate: bool = False


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.ones((), dtype=dtype, device=device)


def _of_result(value: Callable[[Tensor], Tensor], backward: Any) -> Curve:
    """A function whose slope follows from its values."""

    def slope(_: Any, __: Tensor, y: Tensor) -> Tensor:
        found: Tensor = backward(torch.ones_like(y), y)
        return found

    return Curve(lambda _, h: value(h), slope)


def _of_argument(operator: Any, backward: Any, *settings: str) -> Curve:
    """A function whose slope follows from where it is taken; its settings are attributes of the module."""

    def value(part: Any, h: Tensor) -> Tensor:
        found: Tensor = operator(h, **{name: getattr(part, name) for name in settings})
        return found

    def slope(part: Any, h: Tensor, y: Tensor) -> Tensor:
        found: Tensor = backward(torch.ones_like(y), h, **{name: getattr(part, name) for name in settings})
        return found

    return Curve(value, slope)


def _values(_: Any, __: Tensor, y: Tensor) -> Tensor:
    return y


def _by_autograd(kind: type[nn.Module]) -> Curve:
    """A function whose slope autograd computes: it costs a few calls more."""
    forward: Value = kind.forward

    def value(part: Any, h: Tensor) -> Tensor:
        return forward(part, h.clone() if getattr(part, "inplace", False) else h)

    def slope(part: Any, h: Tensor, _: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            return torch.autograd.grad(value(part, leaf).sum(), leaf)[0]

    return Curve(value, slope)


CURVES: dict[type[nn.Module], Curve] = {
    nn.ReLU: Curve(lambda _, h: torch.relu(h), _values, gate=True),
    nn.Tanh: Curve(lambda _, h: torch.tanh(h), lambda _, __, y: torch.addcmul(_one(y.dtype, y.device), y, y, value=-1)),
    nn.Sigmoid: _of_result(torch.sigmoid, _aten.sigmoid_backward),
    nn.GELU: _of_argument(_aten.gelu, _aten.gelu_backward, "approximate"),
    nn.SiLU: _of_argument(_aten.silu, _aten.silu_backward),
    **{
        kind: _by_autograd(kind)
        for kind in (
            nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Mish, nn.LeakyReLU, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink,
        )
    },
}  # fmt: skip
