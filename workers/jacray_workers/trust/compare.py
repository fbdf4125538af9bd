"""Compare numbers with a reference when both are rounded: what is error, and what is the model's own noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacray_workers.trust.projection import rms
from jacray_workers.trust.reference import Point

# Rounding errors of a pass grow about as the square root of the number of operations that a value went through;
# 64 covers what thousands of operations in a row do. Half precision rounds once per stored value, so few times.
GROWTH = {torch.float64: 64.0, torch.float32: 64.0}
GROWTH_HALF = 4.0
# How far beyond the references a result may stand, in units of their usual noise.
BEYOND = 5.0
JITTERS = 4
ROUNDS = 5

Reference = Callable[[Point], Sequence[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """How a result compares.

    Attributes:
        error, tolerance: at the worst entry, relative to the entry's natural scale.
        passed: whether the error is within the tolerance.
        note: what the reader should know of the comparison.
        tensor, entry: where the worst entry stands; -1 where there is nothing to compare.
    """

    error: float
    tolerance: float
    passed: bool
    note: str = ""
    tensor: int = -1
    entry: tuple[int, ...] = ()


@dataclass(frozen=True)
class Oracle:
    """What results are compared with.

    Attributes:
        exact: the sample in float64, or in its own precision where `why` says so.
        plain: the sample in its own precision.
        why: why there is no float64, or the empty string.
        unit: the coarsest rounding unit of the computation.
        seed: of the jitters.
    """

    exact: Point
    plain: Point
    why: str
    unit: float
    seed: int

    @property
    def dtype(self) -> str:
        """The precision that the reference has, as text."""
        return str(self.exact.problem.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        """The relative error that rounding alone may cause in a model that does not amplify it."""
        half = self.unit > torch.finfo(torch.float32).eps * 1.01
        return self.unit * (GROWTH_HALF if half else GROWTH[torch.float32])

    def others(self) -> Iterator[list[Point]]:
        """The sample as rounding might have changed it, a few at a time: in both precisions, then in its own.

        A unit that stands at its kink falls on either side by chance, so before a result is called wrong there are
        enough draws that both sides are all but certain to have been seen.
        """
        if self.exact is not self.plain:
            yield [self.plain, *(self.exact.jittered(self.unit, self.seed - i - 1) for i in range(JITTERS))]
        for start in range(0, ROUNDS * JITTERS, JITTERS):
            yield [self.plain.jittered(self.unit, self.seed + start + i) for i in range(JITTERS)]


def compare(oracle: Oracle, got: Sequence[Tensor], scale: Sequence[Tensor], reference: Reference) -> Verdict:
    """Compare tensors with what `reference` gives at the oracle's sample.

    A result beyond the plain tolerance is not yet wrong: the model may amplify rounding, or stand at a kink that
    rounding crosses. How much shows when the reference itself is evaluated in the model's precision and with inputs
    and parameters moved by a rounding unit; the result must lie within the spread of those, widened by `BEYOND` times
    its size.

    Args:
        oracle: where the references come from.
        got: the result, in float64.
        scale: for each entry the root of the summed squares of the terms that it adds up.
        reference: the same quantity by another path, in float64.
    """
    spread = Spread([r.double() for r in reference(oracle.exact)])
    scales = [_scale(g, s, e) for g, s, e in zip(got, scale, spread.low, strict=True)]
    first = _worst(got, spread, scales, oracle.tolerance)
    if first.passed:
        return first
    final = first
    for points in oracle.others():
        for point in points:
            spread.add([r.double() for r in reference(point)])
        final = _worst(got, spread, scales, oracle.tolerance)
        if final.passed:
            break
    else:
        return final
    note = f"rounding moves the reference itself by more than {oracle.tolerance:.1e} here, so more was allowed"
    return replace(final, note="; ".join(filter(None, (final.note, note))))


class Spread:
    """The smallest and largest value that each entry takes over several references, and how noisy a tensor is."""

    def __init__(self, first: list[Tensor]) -> None:
        self.first, self.low, self.high = first, first, first
        self._noise: list[list[float]] = [[] for _ in first]

    def add(self, reference: Sequence[Tensor]) -> None:
        """Take one more in; what is not finite in one reference stays so."""
        self.low = [torch.minimum(a, b) for a, b in zip(self.low, reference, strict=True)]
        self.high = [torch.maximum(a, b) for a, b in zip(self.high, reference, strict=True)]
        for seen, a, b in zip(self._noise, self.first, reference, strict=True):
            seen.append(rms(_kept(a - b)))

    def noise(self, index: int) -> float:
        """By how much tensor `index` usually moves; the median, which a kink that few draws cross does not sway."""
        return statistics.median(self._noise[index]) if self._noise[index] else 0.0

    def distance(self, index: int, got: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """How far each entry of tensor `index` is outside, how far it may be, and which cannot be compared, if any."""
        low, high = self.low[index], self.high[index]
        if low is high and _finite(got) and _finite(low):
            return (got - low).abs_(), base, None
        dead = ~(torch.isfinite(low) & torch.isfinite(high))
        outside = torch.relu(torch.maximum(got - high, low - got))
        # A result that is not finite where every reference is, is as wrong as can be.
        outside = torch.where(torch.isfinite(got), outside, math.inf)
        allowed = base + torch.where(dead, 0.0, high - low) / 2 + BEYOND * self.noise(index)
        return torch.where(dead, 0.0, outside), allowed, dead


def _finite(tensor: Tensor) -> bool:
    """Whether all of it is finite; a sum that overflows counts as not, which only costs a closer look."""
    return math.isfinite(float(tensor.sum()))


def _scale(got: Tensor, scale: Tensor, exact: Tensor) -> Tensor:
    """The natural size of every entry: of the terms it adds up, and of a typical entry of its tensor."""
    if not got.numel():
        return got.double()
    size = torch.maximum(got.double().abs(), exact.abs())
    torch.maximum(size, scale, out=size)
    if not _finite(size):
        torch.nan_to_num_(size, nan=0.0, posinf=0.0)
    return size.add_(rms(_kept(exact)))


def _kept(tensor: Tensor) -> Tensor:
    """The tensor, or its sizes with 0 for what is not finite."""
    return tensor if _finite(tensor) else torch.nan_to_num(tensor.abs(), nan=0.0, posinf=0.0)


def _worst(got: Sequence[Tensor], spread: Spread, scales: Sequence[Tensor], tolerance: float) -> Verdict:
    """The entry that stands furthest outside of what is allowed."""
    worst, ratio, skipped = Verdict(0.0, tolerance, True), -1.0, 0
    for index, (g, scale) in enumerate(zip(got, scales, strict=True)):
        if not g.numel():
            continue
        distance, allowed, dead = spread.distance(index, g.double(), scale * tolerance)
        skipped += int(dead.sum()) if dead is not None else 0
        # Nothing over nothing is no error; something over nothing is one without bound.
        share = torch.nan_to_num_(distance / allowed, nan=0.0, posinf=math.inf).flatten()
        place = int(share.argmax())
        if float(share[place]) > ratio:
            ratio = float(share[place])
            natural = max(float(scale.flatten()[place]), torch.finfo(torch.float64).tiny)
            error, bound = (float(t.flatten()[place]) / natural for t in (distance, allowed))
            worst = Verdict(error, bound or tolerance, ratio <= 1, "", index, _entry(place, g))
    note = f"{skipped} entries are not finite and were left out" if skipped else ""
    return replace(worst, note=note)


def _entry(place: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
