"""One sample's output numbers cut into ranges, for Jacobians of which a single one is too large for a shard.

A range lies in one output and is a box of its axes, so that whole chunks of a store belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from jacray_workers.plan import ArrayPlan, Plan, Shard
from jacray_workers.problem.problem import Out, Problem
from jacray_workers.shard import ShardResult

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared

Shape = tuple[int, ...]
COUNTED = ("backoffs", "resumed")


def cuts(shapes: Sequence[Shape], most: int) -> tuple[int, ...]:
    """Where to cut the rows of outputs of these shapes so that no range has more than `most` of them.

    Returns:
        The first row of every range, and the number of all rows at the end.
    """
    found, before = [0], 0
    for shape in shapes:
        found.extend(before + stop for stop in _stops(shape, most))
        before += math.prod(shape)
    return tuple(found)


def _stops(shape: Shape, most: int) -> Iterator[int]:
    """The ends of one output's ranges: as many steps along one axis as fit, the axes before it each at one place."""
    axis = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= most), len(shape))
    if axis == len(shape):
        yield 1
        return
    inner = math.prod(shape[axis + 1 :])
    step = max(1, min(most // max(inner, 1), shape[axis])) * inner
    along = shape[axis] * inner
    for place in range(math.prod(shape[:axis])):
        for stop in range(step, along + step, step):
            yield place * along + min(stop, along)


def box(shape: Shape, start: int, stop: int) -> tuple[slice, ...]:
    """The places of a range of rows along the axes of its output."""
    first, last = np.unravel_index(start, shape), np.unravel_index(stop - 1, shape)
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))


def out_shapes(plan: Plan) -> dict[int, Shape]:
    """The shape of each output of which the plan has a Jacobian, by the output's number, in the rows' order."""
    return {a.out: a.shape[1 : 1 + a.out_axes] for a in plan.array("jacobian")}


def place(plan: Plan, array: ArrayPlan, shard: Shard) -> tuple[slice, ...] | None:
    """Where in an array what a shard gives of it stands; None where it gives nothing of it. A sum is given whole."""
    rows: tuple[slice, ...] = ()
    if shard.rows is not None:
        found = _rows(plan, array, shard.rows)
        if found is None:
            return None
        rows = found
    if array.axis < 0:
        return (slice(None),) * len(array.shape)
    return (*(slice(0, n) for n in array.shape[: array.axis]), slice(shard.start, shard.stop), *rows)


def _rows(plan: Plan, array: ArrayPlan, rows: tuple[int, int]) -> tuple[slice, ...] | None:
    """The places of some of the plan's rows along an array's output axes; None where the array has none of them."""
    if array.name != "jacobian":
        return () if rows[0] == 0 else None
    before = 0
    for out, shape in out_shapes(plan).items():
        size = math.prod(shape)
        if before <= rows[0] < before + size:
            return box(shape, rows[0] - before, rows[1] - before) if out == array.out else None
        before += size
    return None


def shares(prepared: Prepared, shard: Shard) -> list[Prepared]:
    """The jobs that make up a shard of some rows: its Jacobian, and with the first rows everything else."""
    rows = shard.rows or (0, prepared.problem.rows)
    known = (rows, prepared.plan.chunk_size)
    if known not in prepared.extra:
        found = [_some_rows(prepared, rows)]
        other = tuple(name for name in prepared.request.returns if name != "jacobian")
        if rows[0] == 0 and other:
            found.append(_without_jacobian(prepared, other))
        prepared.extra[known] = found
    return list(prepared.extra[known])


def _some_rows(prepared: Prepared, rows: tuple[int, int]) -> Prepared:
    """The Jacobian of these rows alone, as that of a model with no other outputs."""
    problem, plan = prepared.problem, prepared.plan
    out = next(out for out in problem.outs if rows[0] in out.rows)
    arrays = tuple(a for a in plan.array("jacobian") if problem.outs[a.out] is out)
    shape = tuple(part.stop - part.start for part in _rows(plan, arrays[0], rows) or ())
    arrays = tuple(replace(a, out=0, shape=(plan.samples, *shape, *a.shape[1 + a.out_axes :])) for a in arrays)
    some = _narrowed(problem, out, rows, shape)
    return replace(
        prepared,
        problem=some,
        request=prepared.request.model_copy(update={"returns": ("jacobian",)}),
        plan=replace(plan, arrays=arrays, rows=some.rows, row_chunk=min(plan.row_chunk, some.rows), row_cuts=()),
        cotangents=None,
        tangents=None,
        extra={},
    )


def _narrowed(problem: Problem, out: Out, rows: tuple[int, int], shape: Shape) -> Problem:
    low, high = rows[0] - out.rows.start, rows[1] - out.rows.start
    pick = range(low, high) if out.pick is None else out.pick[low:high]
    return replace(problem, outs=(replace(out, shape=shape, pick=pick, rows=range(high - low)),), rows=high - low)


def _without_jacobian(prepared: Prepared, returns: tuple[str, ...]) -> Prepared:
    plan = prepared.plan
    return replace(
        prepared,
        request=prepared.request.model_copy(update={"returns": returns}),
        plan=replace(plan, arrays=tuple(a for a in plan.arrays if a.name != "jacobian"), row_cuts=()),
        extra={},
    )


def merged(shard: Shard, results: Sequence[ShardResult]) -> ShardResult:
    """One shard's result from those of its shares."""
    first = results[0]
    return replace(
        first,
        shard=shard,
        blocks={key: block for result in results for key, block in result.blocks.items()},
        checks=tuple(check for result in results for check in result.checks),
        nonfinite=tuple(bad for result in results for bad in result.nonfinite),
        seconds=sum(result.seconds for result in results),
        chunk_size=min(result.chunk_size for result in results),
        facts={**first.facts, **_counted(results)},
    )


def _counted(results: Sequence[ShardResult]) -> dict[str, int]:
    """What the shares of a shard count for the receipt, together."""
    found = {name for result in results for name in COUNTED if name in result.facts}
    return {name: sum(result.facts.get(name, 0) for result in results) for name in sorted(found)}
