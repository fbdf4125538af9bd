"""Bracket a chain of Jacobians at least cost: a matrix-free dynamic programme over the cuts of a model.

A model that is a chain of elements `v_0 -> v_1 -> ... -> v_m` has the Jacobian `J_m ... J_2 J_1`. Each factor can be
had by pulling one cotangent per output of its element back, or by pushing one tangent per input forward; factors can
be multiplied, or one can be pulled and pushed through its neighbours without their ever being made. The order decides
the cost: a bottleneck of width b costs b passes where a pure mode costs as many as the model has outputs or inputs.

See U. Naumann, "Matrix-free Jacobian chaining", arXiv:2406.11862, and A. Griewank and U. Naumann, "Accumulating
Jacobians as chained sparse matrix products", Math. Program. 95, 2003. Everything here is arithmetic on numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["known", "reverse", "forward", "product", "pull", "push"]


@dataclass(frozen=True)
class Chain:
    """A chain of elements, as numbers per sample.

    Attributes:
        widths: how many numbers stand at each cut, ends included: one more than there are elements.
        costs: operations to push or pull one vector through each element.
        known: the element's Jacobian is at hand, as a Linear's weight is.
        forward: a tangent can be pushed through the element.
        write: operations that one number of a Jacobian costs to be written, beside the arithmetic.
        launch: operations that it costs to set vectors going through a segment at all.
    """

    widths: tuple[int, ...]
    costs: tuple[float, ...]
    known: tuple[bool, ...]
    forward: tuple[bool, ...]
    write: float = 0.0
    launch: float = 0.0

    def passing(self, start: int, stop: int) -> float:
        """Operations to take one vector through the elements between two cuts."""
        return sum(self.costs[start:stop])

    def vectors(self, count: int, start: int, stop: int) -> float:
        """Operations to take so many vectors through the elements between two cuts."""
        return self.launch + count * self.passing(start, stop)

    def writing(self, start: int, stop: int) -> float:
        """Operations to write the Jacobian between two cuts."""
        return self.write * self.widths[start] * self.widths[stop]


@dataclass(frozen=True)
class Bracket:
    """How to make the Jacobian of cut `stop` with respect to cut `start`.

    Attributes:
        kind: `known` reads it off; `reverse` and `forward` take unit vectors through; `product` multiplies `left` by
            `right`; `pull` takes the rows of `left` back through what lies before it; `push` takes the columns of
            `right` on through what follows it.
        start, stop: the cuts.
        at: the cut in the middle, for `product`, `pull` and `push`; -1 for the others.
        left, right: the Jacobians from `at` to `stop` and from `start` to `at`, where they are made.
        cost: operations per sample, everything below it included.
    """

    kind: Kind
    start: int
    stop: int
    cost: float
    at: int = -1
    left: Bracket | None = None
    right: Bracket | None = None

    @property
    def parts(self) -> tuple[Bracket, ...]:
        """The brackets that this one uses, the left one first."""
        return tuple(part for part in (self.left, self.right) if part is not None)

    def walk(self) -> Iterator[Bracket]:
        """This bracket and all below it."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def passes(self) -> bool:
        """Whether vectors are taken through elements here, rather than matrices read off or multiplied."""
        return self.kind not in ("known", "product")

    @property
    def through(self) -> tuple[int, int]:
        """The cuts between which vectors are taken here, for a kind that does so."""
        if self.kind == "pull":
            return self.start, self.at
        return (self.at, self.stop) if self.kind == "push" else (self.start, self.stop)


def pure(chain: Chain) -> float:
    """Operations per sample of the better one of plain reverse and plain forward mode over the whole chain."""
    first, last = chain.widths[0], chain.widths[-1]
    vectors = min(first, last) if all(chain.forward) else last
    count = len(chain.costs)
    return chain.vectors(vectors, 0, count) + chain.writing(0, count)


def solve(chain: Chain) -> Bracket:
    """The cheapest bracketing of the whole chain; of equals the simplest."""
    count = len(chain.costs)
    best: dict[tuple[int, int], Bracket] = {}
    for length in range(1, count + 1):
        for start in range(count - length + 1):
            stop = start + length
            best[start, stop] = min(_candidates(chain, start, stop, best), key=lambda bracket: bracket.cost)
    return best[0, count]


def _candidates(chain: Chain, start: int, stop: int, best: dict[tuple[int, int], Bracket]) -> Iterator[Bracket]:
    """Every way to make one sub-chain's Jacobian from the best of its parts, the simplest first."""
    if stop == start + 1 and chain.known[start]:
        yield Bracket("known", start, stop, 0.0)
        return
    wide_in, wide_out = chain.widths[start], chain.widths[stop]
    writing = chain.writing(start, stop)
    yield Bracket("reverse", start, stop, chain.vectors(wide_out, start, stop) + writing)
    if all(chain.forward[start:stop]):
        yield Bracket("forward", start, stop, chain.vectors(wide_in, start, stop) + writing)
    for at in range(start + 1, stop):
        left, right = best[at, stop], best[start, at]
        product = 2.0 * wide_out * chain.widths[at] * wide_in
        yield Bracket("product", start, stop, left.cost + right.cost + product + writing, at, left, right)
        pulled = left.cost + chain.vectors(wide_out, start, at) + writing
        yield Bracket("pull", start, stop, pulled, at, left=left)
        if all(chain.forward[at:stop]):
            pushed = right.cost + chain.vectors(wide_in, at, stop) + writing
            yield Bracket("push", start, stop, pushed, at, right=right)


def useful(chain: Chain, limit: int) -> tuple[int, ...]:
    """The cuts worth giving to `solve`, ends included.

    An inner cut at least as wide as both ends saves nothing, unless it borders on an element whose Jacobian is known.
    Of more than `limit` inner cuts the narrowest are kept, and those beside known elements before all others.
    """
    last = len(chain.costs)
    edges = {cut for at, known in enumerate(chain.known) if known for cut in (at, at + 1)}
    widest = max(chain.widths[0], chain.widths[-1])
    inner = [cut for cut in range(1, last) if chain.widths[cut] < widest or cut in edges]
    inner.sort(key=lambda cut: (cut not in edges, chain.widths[cut], cut))
    return (0, *sorted(inner[:limit]), last)


def merge(chain: Chain, cuts: tuple[int, ...]) -> Chain:
    """The same chain with only these cuts; the first and the last must be among them."""
    spans = list(itertools.pairwise(cuts))
    return Chain(
        widths=tuple(chain.widths[cut] for cut in cuts),
        costs=tuple(chain.passing(a, b) for a, b in spans),
        known=tuple(b == a + 1 and chain.known[a] for a, b in spans),
        forward=tuple(all(chain.forward[a:b]) for a, b in spans),
        write=chain.write,
        launch=chain.launch,
    )


def gain(chain: Chain, bracket: Bracket) -> float:
    """How many times fewer operations the bracket takes than the better pure mode."""
    return pure(chain) / bracket.cost if bracket.cost else math.inf
