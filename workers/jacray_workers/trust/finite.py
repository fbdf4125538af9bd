"""Find NaN and infinity in a result without making anything as large as the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from jacray_workers.shard import NonFinite

CHUNK = 1 << 20


def locate(key: str, tensor: Any, axis: int = 0, start: int = 0) -> NonFinite | None:
    """Count the non-finite numbers of one array and find the first sample that holds one.

    Args:
        key: the array's name.
        tensor: the array, or a factored block, which is looked at a few samples at a time.
        axis: which axis runs over the samples; -1 for none.
        start: the job's number of the first sample.

    Returns:
        What was found, or None where every number is finite.
    """
    if _clearly_finite(tensor):
        return None
    count, first = 0, -1
    for place, part in _parts(tensor, max(axis, 0)):
        if _finite(part):
            continue
        bad = ~torch.isfinite(part)
        found = int(bad.sum())
        if found and first < 0 and axis >= 0:
            first = start + place + int(_along(bad, axis).argmax())
        count += found
    return NonFinite(key, count, first) if count else None


def largest(t: Tensor) -> float:
    """The largest absolute value; NaN where one is NaN, and for complex numbers, which have no order."""
    if t.numel() == 0:
        return 0.0
    if not t.is_floating_point():
        return math.nan
    # In the order in which it lies in memory, and what is repeated only once: else reading takes several times as long.
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    low, high = torch.aminmax(t.permute(order)[tuple(slice(None) if t.stride(d) else 0 for d in order)])
    return max(float(high), -float(low)) if math.isfinite(low) and math.isfinite(high) else math.nan


def _clearly_finite(tensor: Any) -> bool:
    """Whether one cheap pass rules everything out."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if hasattr(tensor, "bound"):
        # The factors bound their products, and they cost no dense numbers.
        return bool(tensor.bound() < torch.finfo(tensor.dtype).max / 2)
    return tensor.dtype != torch.float16 and _finite(tensor)


def _finite(tensor: Tensor) -> bool:
    """Whether the sum is finite, which no NaN or infinity leaves it; a sum that overflows only costs a closer look."""
    # Sums of float16 leave its narrow range early; a wider sum costs a copy of the piece.
    wide = torch.float32 if tensor.dtype == torch.float16 else None
    total = tensor.sum(dtype=wide).item()
    return math.isfinite(total.real) and math.isfinite(total.imag)


def _along(bad: Tensor, axis: int) -> Tensor:
    """Per sample, 1 where it holds something bad."""
    return bad.movedim(axis, 0).flatten(1).any(1).int() if bad.dim() > 1 else bad.int()


def _parts(tensor: Any, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of about `CHUNK` numbers along the samples, each with its place."""
    shape = tuple(tensor.shape)
    if not shape:
        yield 0, tensor
        return
    size = max(math.prod(shape) // max(shape[axis], 1), 1)
    step = max(CHUNK // size, 1)
    for place in range(0, shape[axis], step):
        if hasattr(tensor, "dense"):
            yield place, tensor[place : place + step].dense()
        else:
            yield place, tensor.narrow(axis, place, min(step, shape[axis] - place))
