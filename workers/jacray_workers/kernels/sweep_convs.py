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
# Rows of a table of products up to which it is kept which of them are summed up: at most 4 bytes for each.
KEPT = 1 << 19
# Pairs of an output place and a tap that are sorted, each a few times 8 bytes, by the inputs that they see.
PAIRS = 1 << 20


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
    if cpu and node._saved_groups == 1 and not node._saved_transposed:
        if gathers(weight, settings[0], rows[0, 0].numel()):
            return back(_gathered(rows, weight, tuple(x.shape[2:]), *settings)), None, None
        if weight.dim() == 4 and weight.shape[1] <= FEW_CHANNELS:
            return back(_folded(rows, weight, tuple(x.shape[2:]), *settings)), None, None
    if cpu and weight.dim() == 4:
        shape = (rows.shape[0], *x.shape[1:])
        more = (node._saved_transposed, node._saved_output_padding, node._saved_groups)
        return back(library(rows, weight, shape, *settings, *more)), None, None
    # Only its shape counts where its own gradient is all that is asked for; what is spread would be made whole.
    blank = torch.empty((rows.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    made = _aten.convolution_backward(
        rows.contiguous(), blank, weight, None, *settings, node._saved_transposed,
        node._saved_output_padding, node._saved_groups, (True, False, False),
    )  # fmt: skip
    return back(made[0]), None, None


def library(
    rows: Tensor, weight: Tensor, shape: Sequence[int], stride: Any, padding: Any, dilation: Any,
    transposed: bool = False, beyond: Sequence[int] = (0, 0), groups: int = 1,
) -> Tensor:  # fmt: skip
    """`(N, O, *out)` to `(N, C, *space)` of the given shape over two axes, by the library's own kernels.

    Those for channels that lie innermost in memory are up to four times as fast.
    """
    rows, weight = _channels_last(rows), weight.contiguous(memory_format=torch.channels_last)
    blank = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=torch.channels_last)
    made: tuple[Tensor, ...] = _aten.convolution_backward(
        rows, blank, weight, None, stride, padding, dilation, transposed, beyond, groups, (True, False, False)
    )
    return made[0]


def _channels_last(t: Tensor) -> Tensor:
    """`(N, C, *space)` with the channels innermost in memory."""
    last = t.movedim(1, -1)
    return t if last.is_contiguous() else pages.like(t, last.shape).copy_(last).movedim(-1, 1)


def gathers(weight: Tensor, stride: Sequence[int], places: int) -> bool:
    """Whether a product and a sum are faster than the library, by the kernel `(O, C, *kernel)` and output places."""
    taps = weight[0, 0].numel()
    if weight.dtype != torch.float32 or places * taps > PAIRS:
        return False
    few = taps <= FEW_PLACES * math.prod(_each(stride, weight.dim() - 2))
    return weight.shape[1] <= (SOME_CHANNELS if few else FEW_CHANNELS)


def _each(numbers: Sequence[int], axes: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    return tuple(numbers) if len(numbers) == axes else tuple(numbers) * axes


def _folded(rows: Tensor, weight: Tensor, space: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The same in any precision over two axes, by torch's own sum."""
    columns = torch.matmul(weight.flatten(1).mT, rows.flatten(2))
    return F.fold(columns, space, tuple(weight.shape[2:]), dilation, padding, stride)


def _gathered(rows: Tensor, weight: Tensor, space: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """`(N, O, *out)` to `(N, C, *space)`, some images at a time."""
    axes, (out, channels), images = len(space), weight.shape[:2], rows.shape[0]
    settings = (_each(numbers, axes) for numbers in (stride, padding, dilation))
    table = rows[0, 0].numel() * weight[0].numel() * rows.itemsize
    step = -(-images // max(1, min(images, images * table // CACHED)))
    flat, places = _channels_last(rows).movedim(1, -1), tuple(rows.shape[2:])
    seen = (space, places, *settings)
    parts = [gather(p.reshape(-1, out), weight, len(p), 1, *seen) for p in flat.split(step)]
    size = (images * math.prod(space), channels)
    found = parts[0] if len(parts) == 1 else torch.cat(parts, out=pages.like(rows, size))
    return found.view(images, *space, channels).movedim(-1, 1)


def gather(
    cots: Tensor, weight: Tensor, images: int, rows: int, space: tuple[int, ...], out: tuple[int, ...],
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """`(images * places * rows, O)` to `(images * inputs * rows, C)`, each lying in this order."""
    matrix = weight.movedim(1, -1).reshape(weight.shape[0], -1).mT.contiguous().mT
    table = matmul.mm(cots, matrix).view(-1, weight.shape[1])
    settings = (space, out, tuple(weight.shape[2:]), stride, padding, dilation, rows)
    small = table.shape[0] <= KEPT
    triples, inputs = _of_images(images, *settings) if small else _of_images.__wrapped__(images, *settings)
    found: Tensor = torch.embedding_bag(table, triples, inputs, False, 0, False)[0]
    return found


@functools.lru_cache(maxsize=8)
def _of_images(images: int, *settings: Any) -> tuple[Tensor, Tensor]:
    """What `_seen` returns, for some images one after the other."""
    order, starts = _seen(*settings)
    _, out, kernel, *_, rows = settings
    image = torch.arange(images, dtype=torch.int32).unsqueeze(1)
    triples = (image * (math.prod(out) * rows * math.prod(kernel)) + order).flatten()
    return triples, (image * len(order) + starts).flatten()


@functools.lru_cache(maxsize=8)
def _seen(
    space: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...],
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which triples of an output place, a row of cotangents and a tap each pair of an input place and a row sums up.

    Returns:
        the triples, numbered tap by tap, row by row, place by place, in the order of the inputs and rows that they are
        for; and for each of these where its triples begin.
    """
    at, inside, axes = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool), len(space)
    for axis, (n, o, k, s, p, d) in enumerate(zip(space, out, kernel, stride, padding, dilation, strict=True)):
        line = torch.arange(o).unsqueeze(1) * s - p + torch.arange(k) * d
        line = line.view([o if i == axis else k if i == axes + axis else 1 for i in range(2 * axes)])
        at, inside = at * n + line, inside & (line >= 0) & (line < n)
    taps, row = math.prod(kernel), torch.arange(rows)
    seen = inside.expand(*out, *kernel).flatten().nonzero().flatten().unsqueeze(1)
    triples = ((seen // taps * rows + row) * taps + seen % taps).flatten()
    to = (at.expand(*out, *kernel).flatten()[seen] * rows + row).flatten()
    counts = torch.bincount(to, minlength=math.prod(space) * rows)
    return triples[to.argsort(stable=True)].int(), (counts.cumsum(0) - counts).int()
