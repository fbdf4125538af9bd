"""What a convolution does to many cotangents of its output at once: cotangents of its input.

The rule is of the form that `sweep_rules` describes. The library's kernels are near the processor's rate where
channels are many. Where they are few the same is a matrix product, which gives each place of the output one number for
every input that it saw, and a sum over the places that each input was seen from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from jacray_workers import pages
from jacray_workers.kernels import matmul
from jacray_workers.kernels.arrivals import in_rows
from jacray_workers.kernels.sweep_views import Found

_aten = torch.ops.aten

# Input channels up to which a convolution is too narrow for the library's own kernels, whatever its strides ...
FEW_CHANNELS = 4
# ... and up to which it is where each input is seen from few places.
SOME_CHANNELS, FEW_PLACES = 32, 3
# Bytes of products between the two steps: they should not leave the cache.
CACHED = 1 << 23


def convolution(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A convolution's input: all cotangents as one batch."""
    if needs != (True, False, False) or g.dim() < 4:
        return None
    rows, back = in_rows(g, g.dim() - 2)
    weight, x = node._saved_weight, node._saved_input
    if rows.dim() != weight.dim():
        return None
    settings = (node._saved_stride, node._saved_padding, node._saved_dilation)
    cpu = weight.device.type == "cpu"
    if cpu and node._saved_groups == 1 and not node._saved_transposed and _narrow(weight, settings[0]):
        return back(_gathered(rows, weight, tuple(x.shape[2:]), *settings)), None, None
    plane = weight.dim() == 4 and cpu
    if plane:
        # The library's kernels for this layout are up to four times as fast.
        rows, weight = _channels_last(rows), weight.contiguous(memory_format=torch.channels_last)
    # Only its shape counts where its own gradient is all that is asked for; what is spread would be made whole.
    layout = torch.channels_last if plane else torch.contiguous_format
    blank = torch.empty((rows.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)
    made = _aten.convolution_backward(
        rows if plane else rows.contiguous(), blank, weight, None, *settings, node._saved_transposed,
        node._saved_output_padding, node._saved_groups, (True, False, False),
    )  # fmt: skip
    return back(made[0]), None, None


def _channels_last(t: Tensor) -> Tensor:
    """`(N, C, *space)` with the channels innermost in memory."""
    last = t.movedim(1, -1)
    return t if last.is_contiguous() else pages.like(t, last.shape).copy_(last).movedim(-1, 1)


def _narrow(weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether a product and a sum are faster than the library."""
    if weight.dtype != torch.float32:
        return weight.dim() == 4 and weight.shape[1] <= FEW_CHANNELS
    places = weight[0, 0].numel() / math.prod(_each(stride, weight.dim() - 2))
    return weight.shape[1] <= (SOME_CHANNELS if places <= FEW_PLACES else FEW_CHANNELS)


def _each(numbers: Sequence[int], axes: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    return tuple(numbers) if len(numbers) == axes else tuple(numbers) * axes


def _gathered(rows: Tensor, weight: Tensor, space: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """`(N, O, *out)` to `(N, C, *space)`, some images at a time."""
    if rows.dtype != torch.float32:
        columns = torch.matmul(weight.flatten(1).mT, rows.flatten(2))
        return F.fold(columns, space, tuple(weight.shape[2:]), dilation, padding, stride)
    axes, (out, channels) = len(space), weight.shape[:2]
    seen = (_each(numbers, axes) for numbers in (stride, padding, dilation))
    order, starts = _seen(space, tuple(rows.shape[2:]), tuple(weight.shape[2:]), *seen)
    places, taps = rows[0, 0].numel(), weight[0, 0].numel()
    matrix = weight.movedim(1, -1).reshape(out, -1).mT.contiguous().mT
    images = rows.shape[0]
    step = -(-images // max(1, images * places * matrix.shape[1] * rows.itemsize // CACHED))
    image = torch.arange(step, dtype=torch.int32).unsqueeze(1)
    order, starts = (image * (places * taps) + order).flatten(), (image * len(order) + starts).flatten()
    parts = []
    for part in _channels_last(rows).movedim(1, -1).split(step):
        table = matmul.mm(part.reshape(-1, out), matrix).view(-1, channels)
        pairs, inputs = (t[: len(t) // step * len(part)] for t in (order, starts))
        parts.append(torch.embedding_bag(table, pairs, inputs, False, 0, False)[0])
    found = (
        parts[0] if len(parts) == 1 else torch.cat(parts, out=pages.like(rows, (images * math.prod(space), channels)))
    )
    return found.view(images, *space, channels).movedim(-1, 1)


@functools.lru_cache(maxsize=8)
def _seen(
    space: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...],
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which pairs of an output place and a tap saw each input place.

    Returns:
        the pairs, numbered tap by tap within each output place, in the order of the inputs that they saw; and for each
        input where its pairs begin.
    """
    at, inside, axes = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), len(space)
    for axis, (n, o, k, s, p, d) in enumerate(zip(space, out, kernel, stride, padding, dilation, strict=True)):
        line = torch.arange(o).unsqueeze(1) * s - p + torch.arange(k) * d
        line = line.view([o if i == axis else k if i == axes + axis else 1 for i in range(2 * axes)])
        at, inside = at * n + line, inside & (line >= 0) & (line < n)
    pairs = inside.expand(*out, *kernel).flatten().nonzero().flatten()
    at = at.expand(*out, *kernel).flatten()[pairs]
    counts = torch.bincount(at, minlength=math.prod(space))
    return pairs[at.argsort(stable=True)].int(), (counts.cumsum(0) - counts).int()
