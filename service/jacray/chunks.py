"""How an array of results is laid out in a store: chunk shapes and dimension names."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jacray_workers.plan import ArrayPlan, Plan

CHUNK_BYTES = 1 << 26
SMALL_BYTES = 1 << 20
LARGE_BYTES = 1 << 29


def chunk_shape(array: ArrayPlan, plan: Plan) -> tuple[int, ...]:
    """The chunks of one array: bounded in bytes, and never shared by two shards.

    Two writers of one chunk lose data, so along the samples a chunk's size divides a shard's. What is larger than the
    bound for a single sample is cut along its other axes.
    """
    shape = [max(n, 1) for n in array.shape]
    item = int(array.dtype.removeprefix("float")) // 8
    if array.axis >= 0:
        per_sample = math.prod(shape) // shape[array.axis] * item
        shape[array.axis] = _samples(min(plan.shard_size, shape[array.axis]), per_sample)
    for axis in _largest_first(shape, array.axis):
        rest = math.prod(shape) // shape[axis] * item
        if rest * shape[axis] > LARGE_BYTES:
            shape[axis] = max(1, CHUNK_BYTES // rest)
    return tuple(shape)


def _samples(shard: int, per_sample: int) -> int:
    """The divisor of a shard's samples that makes the chunk nearest below the bound, unless that is a tiny one."""
    divisors = _divisors(shard)
    below = [n for n in divisors if n * per_sample <= CHUNK_BYTES] or [1]
    best = max(below)
    above = [n for n in divisors if CHUNK_BYTES < n * per_sample <= LARGE_BYTES]
    # A shard of a prime number of samples has no divisor between one sample and all.
    return min(above) if above and best * per_sample < SMALL_BYTES else best


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _largest_first(shape: list[int], axis: int) -> list[int]:
    return sorted((i for i in range(len(shape)) if i != axis), key=lambda i: -shape[i])


def dimension_names(arrays: Iterable[ArrayPlan]) -> dict[str, tuple[str, ...]]:
    """The dimensions of each array by key, such that one name has one size everywhere.

    xarray refuses a group in which it has two; an array whose name for a dimension is taken gets one of its own.
    """
    sizes: dict[str, int] = {}
    found: dict[str, tuple[str, ...]] = {}
    for array in arrays:
        names: list[str] = []
        for name, size in zip(array.dims, array.shape, strict=True):
            own = name if name not in names and sizes.get(name, size) == size else f"{array.key}.{name}"
            while own in names or sizes.get(own, size) != size:
                own = f"{own}_"
            sizes[own] = size
            names.append(own)
        found[array.key] = tuple(names)
    return found
