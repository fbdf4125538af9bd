"""Convolutions and transposed convolutions over one, two or three axes.

Source: Rochette, Manoel and Tramel, "Efficient per-example gradient computations in convolutional neural networks"
(2019).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from jacray_workers.blocks.terms import Conv
from jacray_workers.blocks.windows import Window, same_padding
from jacray_workers.rules.common import Terms, Unfit, Use

FORWARD = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
CONVOLUTION = (
    "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
)  # fmt: skip


def conv(use: Use) -> Terms:
    """`conv1d`, `conv2d`, `conv3d`."""
    return _terms(use, transposed=False)


def conv_transpose(use: Use) -> Terms:
    """`conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`."""
    return _terms(use, transposed=True)


def convolution(use: Use) -> Terms:
    """The operator below them all, as exported graphs have it."""
    return _terms(use, transposed=bool(use.value("transposed")))


def _terms(use: Use, *, transposed: bool) -> Terms:
    weight = use.value("weight")
    axes = weight.dim() - 2
    if use.out_axis.dim != 0 or len(use.tap.shape) != axes + 2 or use.tap.target.dtype.is_complex:
        raise Unfit("axes")
    found: Terms = {}
    if (path := use.source("weight")) is not None:
        x = _images(use, axes)
        window = _window(use, tuple(weight.shape[2:]), transposed=transposed)
        found[path] = Conv(use.own(path), None, x=x, g=use.cots, window=window)
    if (path := use.source("bias")) is not None:
        found[path] = use.dense(path, use.cots.flatten(4).sum(dim=(2, 4)))
    return found


def _images(use: Use, axes: int) -> Tensor:
    """The input as `(B, N, C, *space)`."""
    if use.axis("input").dim != 0 or use.value("input").dim() != axes + 2:
        raise Unfit("input")
    return use.samples("input")


def _window(use: Use, kernel: tuple[int, ...], *, transposed: bool) -> Window:
    axes = len(kernel)
    stride, dilation = (_each(use.value(name, 1), axes) for name in ("stride", "dilation"))
    padding = use.value("padding", 0)
    if padding == "same":
        before, after = same_padding(kernel, dilation)
    else:
        before = after = (0,) * axes if padding == "valid" else _each(padding, axes)
    return Window(kernel, stride, dilation, before, after, int(use.value("groups", 1)), transposed)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    numbers = tuple(int(n) for n in value) if isinstance(value, list | tuple) else (int(value),)
    return numbers if len(numbers) == axes else numbers * axes
