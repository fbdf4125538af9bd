"""How many samples go in a chunk and in a shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jacray_workers.errors import BudgetError, Plain
from jacray_workers.plan import ArrayPlan
from jacray_workers.planning.explain import size as show
from jacray_workers.planning.memory import Line
from jacray_workers.rowcuts import cuts

# A chunk's working memory beyond this gains no speed; a shard's blocks beyond it travel badly.
CHUNK_BYTES = 1 << 28
# Beyond this it leaves the cache, which costs work that is all memory traffic up to twice its time; chunks of few
# samples cost calls, a few tenths of a millisecond each. Between a half of this and its double little changes, for nets
# and for plain functions, with one thread and with two.
CACHE_BYTES, SEVERAL = 1 << 24, 64
# The least share of a chunk's memory that is taken to be its own, beside what it writes into the result.
WORKING = 1 / 16
SHARD_BYTES = 1 << 28
# Shards per worker: enough that the last ones even out and progress shows, few enough that each is worth its dispatch.
SHARDS_PER_WORKER = 4


@dataclass(frozen=True)
class Sizes:
    """Samples per chunk and per shard, rows in flight, and the predicted peak."""

    chunk: int
    shard: int
    rows: int
    peak: int


def bytes_per_sample(arrays: Sequence[ArrayPlan], samples: int) -> int:
    """Bytes of the result that grow with the samples, for one of them."""
    return sum(array_bytes(a) for a in arrays if a.axis >= 0) // max(samples, 1)


def array_bytes(array: ArrayPlan) -> int:
    """Bytes of one dense array; sums are held in float64 while they grow."""
    item = {"float64": 8, "float32": 4, "float16": 2}[array.dtype]
    return array.size * (8 if array.axis < 0 else item)


def sizes(
    samples: int,
    workers: int,
    apart: bool,
    chunk_size: int | None,
    line: Line,
    held: int,
    per_sample: int,
    budget: int,
    rows: int,
    direct: int,
) -> Sizes:
    """Choose chunk and shard so that the peak stays within the budget.

    Args:
        samples: in the job.
        workers: that share it.
        apart: the result is kept elsewhere than where it is computed, so a shard is all that is held of it.
        chunk_size: as the user fixed it, or None.
        line: peak working bytes of a chunk by its samples, the result aside.
        held: bytes of the result that a worker holds whatever the shard: partial sums.
        per_sample: bytes of result per sample.
        budget: bytes.
        rows: rows in flight.
        direct: bytes per sample that a chunk writes straight into the result, and that the line counts as its own.

    Raises:
        BudgetError: not even one sample fits; names both figures.
    """
    shard = samples if workers == 1 else math.ceil(samples / (workers * SHARDS_PER_WORKER))
    if per_sample:
        shard = max(1, min(shard, SHARD_BYTES // per_sample)) if apart else shard
    room = budget - held - shard * per_sample
    fits = line.fit_in(room)
    if fits < 1 or (chunk_size is not None and fits < chunk_size):
        wanted = chunk_size or 1
        raise refusal(line.at(wanted) + held + shard * per_sample, budget, wanted)
    cap = samples
    if line.slope > 0:
        # What goes to the result never stays in the cache, and is there whatever the chunk.
        working = max(line.slope - direct, line.slope * WORKING)
        most, cached = (int((room - line.base) / working) for room in (CHUNK_BYTES, CACHE_BYTES))
        cap = max(1, min(most, max(SEVERAL, cached)))
    chunk = min(chunk_size or even(shard, max(1, min(fits, cap, shard))), samples)
    shard = min(samples, math.ceil(shard / chunk) * chunk)
    return Sizes(chunk, shard, rows, line.at(chunk) + held + shard * per_sample)


def even(total: int, most: int) -> int:
    """The chunk of at most so many that needs as few chunks, without a small one at the end."""
    return math.ceil(total / math.ceil(total / most))


def row_cuts(arrays: Sequence[ArrayPlan], apart: bool) -> tuple[int, ...]:
    """Where to cut the rows of a sample whose Jacobian alone is too large for a shard; empty where none is."""
    dense = [a for a in arrays if a.name == "jacobian"]
    if not apart or not dense or any(a.factored for a in dense):
        return ()
    widths: dict[int, int] = {}
    for array in dense:
        row = array_bytes(array) // max(math.prod(array.shape[: 1 + array.out_axes]), 1)
        widths[array.out] = widths.get(array.out, 0) + row
    shapes = {array.out: array.shape[1 : 1 + array.out_axes] for array in dense}
    if sum(math.prod(shape) * widths[out] for out, shape in shapes.items()) <= SHARD_BYTES:
        return ()
    return cuts(list(shapes.values()), max(1, SHARD_BYTES // max(widths.values())))


def largest_part(arrays: Sequence[ArrayPlan], samples: int, ranges: tuple[int, ...]) -> int:
    """Bytes of the result that grow with the samples, for the largest range of one sample's rows."""
    whole = bytes_per_sample([a for a in arrays if not a.factored], samples)
    if not ranges:
        return whole
    jacobian = bytes_per_sample([a for a in arrays if a.name == "jacobian"], samples)
    most = max(b - a for a, b in pairwise(ranges))
    return whole - jacobian + math.ceil(jacobian * most / ranges[-1])


def refusal(needed: int, budget: int, samples: int) -> BudgetError:
    """The error that names both memory figures."""
    return BudgetError(
        "memory_budget",
        f"{samples} sample{'s' * (samples > 1)} at a time would take {show(needed)}, result included",
        Plain(f"a budget of {show(budget)}"),
        "raise the budget, choose fewer outputs or parameters, keep parameters in factors (form='auto'), "
        "or ask for a product (norms, gram, ntk, weighted_gradient) in place of the Jacobian",
    )
