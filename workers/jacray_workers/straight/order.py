"""In which order the weights of a plain net are multiplied, and how: the cheapest by dynamic programming.

A net of Linear layers with functions of one number between them has the Jacobian `W_m D_m ... D_2 W_1`, where the
weights are shared by all samples and each `D` is a sample's own diagonal. A product of two shared weights around a
diagonal, `A D B`, can be had by scaling the columns of `A`, by scaling the rows of `B`, or as one product of the
diagonals with the small tensor `A[o,k] B[k,i]`. Everything here is arithmetic on numbers.

Source of the bracketing: A. Griewank and U. Naumann, "Accumulating Jacobians as chained sparse matrix products", Math.
Program. 95, 2003.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

How = Literal["weight", "merge", "columns", "rows", "spread", "back", "on", "pairs"]

# Operations that take as long as to read, scale and write one number, and as one call of torch on a small tensor.
TOUCH = 16.0
CALL = 2e5
# How much slower many small products are than one large one.
SMALL = 1.5
# Numbers that a tensor made of weights alone may hold.
SPREAD = 1 << 22


@dataclass(frozen=True)
class Step:
    """How to make the Jacobian of width `stop` with respect to width `start`.

    Attributes:
        how: `weight` reads it off; `merge` multiplies shared matrices; `columns` scales the left weight's columns for
            each sample and multiplies by the right one; `rows` scales the right weight's rows; `spread` multiplies the
            diagonals by the weights' products; `back` takes a sample's own left matrix through the right weight; `on`
            takes a sample's own right matrix through the left weight; `pairs` multiplies two of each sample.
        start, stop: the widths between which it leads.
        at: the width in the middle; -1 for `weight`.
        left, right: the Jacobians from `at` to `stop`, and from `start` to `at`.
        apart: each sample has its own.
        turned: it lies in memory column by column.
        cost: what it takes for the whole batch in operations of a product, everything below included.
        operations: of its products alone.
    """

    how: How
    start: int
    stop: int
    at: int = -1
    left: Step | None = None
    right: Step | None = None
    apart: bool = False
    turned: bool = False
    cost: float = 0.0
    operations: float = 0.0


@functools.lru_cache(maxsize=256)
def solve(widths: tuple[int, ...], bent: tuple[bool, ...], samples: int) -> Step:
    """The cheapest way.

    Args:
        widths: numbers of one sample before each weight, and behind the last.
        bent: whether a diagonal stands at each width.
        samples: the batch's size.
    """
    last = len(widths) - 1
    best: dict[tuple[int, int], list[Step]] = {}
    for length in range(1, last + 1):
        for start in range(last - length + 1):
            stop = start + length
            found = list(_ways(widths, bent, samples, start, stop, best))
            # The cheapest of each layout: what comes next may need the one or the other.
            layouts = ([step for step in found if step.turned is turned] for turned in (False, True))
            best[start, stop] = [min(steps, key=lambda step: step.cost) for steps in layouts if steps]
    # What lies column by column is copied in the end.
    ends = widths[0] * widths[last] * samples * TOUCH
    return min(best[0, last], key=lambda step: step.cost + (ends if step.turned else 0.0))


def _ways(
    widths: tuple[int, ...],
    bent: tuple[bool, ...],
    samples: int,
    start: int,
    stop: int,
    best: dict[tuple[int, int], list[Step]],
) -> Iterator[Step]:
    if stop == start + 1:
        yield Step("weight", start, stop)
        return
    for at in range(start + 1, stop):
        for left in best[at, stop]:
            for right in best[start, at]:
                yield from _joined(widths, bent[at], samples, left, right)


def _joined(widths: tuple[int, ...], bent: bool, samples: int, left: Step, right: Step) -> Iterator[Step]:
    """Every way to multiply two Jacobians that stand."""
    start, at, stop = right.start, left.start, left.stop
    o, k, i = widths[stop], widths[at], widths[start]
    below, product = left.cost + right.cost + CALL, 2.0 * o * k * i
    done = left.operations + right.operations
    scaling = TOUCH * samples if bent else 0.0

    def step(how: How, cost: float, *, apart: bool = True, turned: bool = False) -> Step:
        operations = done + product * (samples if apart else 1)
        return Step(how, start, stop, at, left, right, apart, turned, below + cost, operations)

    if left.apart and right.apart:
        yield step("pairs", samples * product * SMALL + scaling * min(o * k, k * i))
    elif left.apart:
        if not left.turned:
            yield step("back", samples * product + scaling * o * k)
    elif right.apart:
        if right.turned:
            yield step("on", samples * product + scaling * k * i, turned=True)
            yield step("on", samples * product * SMALL + scaling * k * i)
    elif bent:
        yield step("columns", samples * product + scaling * o * k)
        yield step("rows", samples * product + scaling * k * i, turned=True)
        if o * k * i <= SPREAD:
            yield step("spread", samples * product + TOUCH * o * k * i)
    else:
        yield step("merge", product, apart=False)
