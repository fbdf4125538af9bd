"""How an array of results is laid out in a store: chunk shapes and dimension names."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.rowcuts import box, out_shapes

# A chunk is what is checked and read at once: enough that files are few, little enough that a slice reads little else.
CHUNK_BYTES = 1 << 24
SMALL_BYTES = 1 << 20
LARGE_BYTES = 1 << 28


def chunk_shape(array: ArrayPlan, plan: Plan) -> tuple[int, ...]:
    """The chunks of one array: bounded in bytes, and never shared by two shards.

    Two writers of one chunk lose data, so along the samples a chunk's size divides a shard's. What is larger than the
    bound for a single sample is cut along its other axes.
    """
    shape = [max(n, 1) for n in array.shape]
    item = int(array.dtype.removeprefix("float")) // 8
    fixed = _rows(array, plan)
    shape[1 : 1 + len(fixed)] = fixed
    if array.axis >= 0:
        per_sample = math.prod(shape) // shape[array.axis] * item
        shape[array.axis] = _samples(min(plan.shard_size, shape[array.axis]), per_sample)
    for axis in _largest_first(shape, (array.axis, *range(1, 1 + len(fixed)))):
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


def _largest_first(shape: list[int], but: tuple[int, ...]) -> list[int]:
    return sorted((i for i in range(len(shape)) if i not in but), key=lambda i: -shape[i])


def _rows(array: ArrayPlan, plan: Plan) -> list[int]:
    """The chunk's sizes along the output's axes, where shards hold some rows only: those of the first range."""
    if not plan.row_cuts or array.name != "jacobian":
        return []
    shapes = out_shapes(plan)
    before = sum(math.prod(shape) for out, shape in shapes.items() if out < array.out)
    stop = next(cut for cut in plan.row_cuts if cut > before)
    return [s.stop - s.start for s in box(shapes[array.out], 0, stop - before)]


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
