"""Check what was computed for one sample against an independent path: plain autograd and differences in float64.

Two identities hold for every Jacobian. Pulled back, u.J is one plain backward, so a random u compares a whole block
with one pass. Pushed forward, J.v is the slope of the function along v, which asks autograd nothing at all; where the
function has a kink, or a backward of its own making, the two disagree, and a backward from the row in doubt decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacray_workers.compare import Oracle, Verdict, compare
from jacray_workers.errors import VerificationError
from jacray_workers.problem import Problem
from jacray_workers.reference import Point, generator, normal, own, points, rounding, wide
from jacray_workers.shard import Check
from jacray_workers.slope import slope

CHUNK = 1 << 22
# A factored block of more numbers than this is not made dense for a check.
FACTORED = 1 << 25
# A sum is checked by one backward for each of its samples; more than this would cost too much for a check.
SUM_LIMIT = 16


@dataclass(frozen=True)
class Computed:
    """What a method gave for one sample; None for what was not asked for. Sequences follow `problem.leaves`.

    Attributes:
        jacobian: per leaf `(rows, *leaf)`, a tensor or a factored block of the sample.
        cotangents: `(K, rows)`.
        gradients: per leaf `(K, *leaf)`, of those cotangents.
        tangents: per leaf `(K, *leaf)`.
        pushed: `(K, rows)`, of those tangents.
    """

    jacobian: Sequence[Any] | None = None
    cotangents: Tensor | None = None
    gradients: Sequence[Tensor] | None = None
    tangents: Sequence[Tensor] | None = None
    pushed: Tensor | None = None


def check_sample(
    problem: Problem, batch: Sequence[Tensor], sample: int, computed: Computed, *, seed: int = 0, position: int = 0,
    double: Problem | None = None,
) -> tuple[Check, ...]:  # fmt: skip
    """Compare one sample's results with independent computations; called inside `problem.session()`.

    Args:
        problem: what was differentiated.
        batch: the placed inputs of the sample alone; where random numbers were drawn for a whole batch, that batch.
        sample: the sample's number in the job, for the report.
        computed: the results.
        seed: of the directions.
        position: the sample's place in `batch`.
        double: `reference.in_float64(problem)`, to share it among samples.
    """
    checker = _checker(problem, batch, position, sample, seed, double)
    checks: list[Check] = []
    if computed.jacobian is not None:
        checks += checker.jacobian(computed.jacobian)
    if computed.gradients is not None and computed.cotangents is not None:
        checks += checker.gradients(computed.cotangents, computed.gradients)
    if computed.pushed is not None and computed.tangents is not None:
        checks += checker.pushed(computed.tangents, computed.pushed)
    return tuple(checks)


def check_sum(
    problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, result: Sequence[Tensor | None], *, seed: int = 0,
    double: Problem | None = None,
) -> tuple[Check, ...]:  # fmt: skip
    """Compare weighted gradients summed over a batch with plain backwards, one for each sample alone.

    Args:
        problem: what was differentiated.
        batch: the placed inputs of the samples that were summed over; more than `SUM_LIMIT` are left out, with a note.
        cotangents: `(K, B, rows)`.
        result: for each leaf `(K, *param)`, or `(K, B, *leaf)` where it is no parameter; None is left out.
        seed: of the combination of the K.
        double: `reference.in_float64(problem)`, to share it among checks.
    """
    size = batch[0].shape[0]
    if size > SUM_LIMIT:
        note = f"left out: a sum over {size} samples is more than the {SUM_LIMIT} that a check may cost"
        return (Check(-1, "summed weighted gradient", 0.0, 0.0, True, note),)
    checker = _checker(problem, [leaf[:1] for leaf in batch], 0, -1, seed, double).widened(batch)
    return tuple(checker.gradients(cotangents, result, "summed weighted gradient"))


def raise_if_failed(checks: Sequence[Check]) -> None:
    """Fail loudly.

    Raises:
        VerificationError: a check did not hold; it names the sample, what was compared, the error and the tolerance.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    worst = max(failed, key=lambda check: check.error / max(check.tolerance, 1e-300))
    where = f"sample {worst.sample}" if worst.sample >= 0 else "the sum over samples"
    raise VerificationError(
        f"{where}: {worst.what}: the relative difference is {worst.error:.2e}, allowed {worst.tolerance:.2e}"
        f"{f' ({worst.note})' if worst.note else ''}; {len(failed)} of {len(checks)} checks failed. The numbers are not"
        " to be trusted: another method (method='backward_loop' uses plain autograd) may give right ones, verify=False"
        " returns these as they are, and a report with the model would help to mend the method"
    )


def _checker(
    problem: Problem, batch: Sequence[Tensor], position: int, sample: int, seed: int, double: Problem | None
) -> _Checker:
    exact, plain, why = points(problem, batch, position, double)
    return _Checker(Oracle(exact, plain, why, rounding(problem), seed + sample + 1), sample)


class _Checker:
    """The checks of one sample; directions are drawn once, from the seed and the sample."""

    def __init__(self, oracle: Oracle, sample: int) -> None:
        self.oracle, self.sample = oracle, sample
        self.source = generator(oracle.seed)
        self.device = oracle.exact.problem.device

    def widened(self, batch: Sequence[Tensor]) -> _Checker:
        """The same checks with points that hold a whole batch."""
        plain = replace(self.oracle.plain, batch=tuple(batch))
        exact = replace(self.oracle.exact, batch=tuple(wide(leaf) for leaf in batch))
        oracle = replace(self.oracle, exact=plain if self.oracle.exact is self.oracle.plain else exact, plain=plain)
        return _Checker(oracle, self.sample)

    def weights(self, count: int) -> Tensor:
        """Random numbers, none close to zero and no two alike: a fault in any one row shows, and so does a swap."""
        sign = torch.randint(2, (count,), generator=self.source) * 2 - 1
        return (sign * (0.5 + torch.rand(count, dtype=torch.float64, generator=self.source))).to(self.device)

    def tangent(self) -> list[Tensor]:
        """A random direction for every leaf, of the size of the leaf's values."""
        exact = self.oracle.exact
        values = [exact.at(leaf, value) for leaf, value in zip(exact.problem.leaves, exact.values(), strict=True)]
        return [normal(value.double(), self.source) * _size(value) for value in values]

    def jacobian(self, blocks: Sequence[Any]) -> list[Check]:
        """A whole Jacobian: pulled back by a random u, pushed forward along a random v."""
        u, v = self.weights(self.oracle.exact.problem.rows), self.tangent()
        parts = [_project(block, u, direction) for block, direction in zip(blocks, v, strict=True)]
        pulled, pulled_scale = [p.pulled for p in parts], [p.pulled_square.sqrt() for p in parts]
        verdict = compare(self.oracle, pulled, pulled_scale, lambda point: point.pull(u))
        pushed = sum((p.pushed for p in parts), torch.zeros_like(u))
        scale = sum((p.pushed_square for p in parts), torch.zeros_like(u)).sqrt()
        return [
            self.check("u.J against a {} backward", verdict, leaves=True),
            self.slope("J.v against a {} central difference", pushed, scale, v),
        ]

    def gradients(
        self, cotangents: Tensor, gradients: Sequence[Tensor | None], name: str = "weighted gradient"
    ) -> list[Check]:
        """Weighted gradients: one backward from a random combination of the cotangents compares all K."""
        mix = self.weights(cotangents.shape[0])
        kept = [i for i, gradient in enumerate(gradients) if gradient is not None]
        got = [_mixed(gradients[i], mix) for i in kept]
        scale = [_mixed_size(gradients[i], mix) for i in kept]
        k = _mixed(cotangents, mix)

        def pull(point: Point) -> list[Tensor]:
            found = point.pull(k) if k.dim() == 1 else _summed(point, k)
            return [found[i] for i in kept]

        verdict = compare(self.oracle, got, scale, pull)
        return [self.check(f"{name} against a {{}} backward", verdict, kept)]

    def pushed(self, tangents: Sequence[Tensor], pushed: Tensor) -> list[Check]:
        """Tangents pushed forward: a random combination against backwards, and against the function's slope."""
        mix = self.weights(pushed.shape[0])
        v = [_mixed(tangent, mix) for tangent in tangents]
        got, scale = _mixed(pushed, mix), _mixed_size(pushed, mix)
        u = self.weights(got.shape[0])

        def adjoint(point: Point) -> list[Tensor]:
            terms = [g.double() * t for g, t in zip(point.pull(u), v, strict=True)]
            return [torch.stack([term.sum() for term in terms]).sum()]

        verdict = compare(self.oracle, [(u * got).sum()], [(u * scale).square().sum().sqrt()], adjoint)
        return [
            self.check("u.jvp against a {} backward", verdict),
            self.slope("jvp against a {} central difference", got, scale, v),
        ]

    def slope(self, what: str, got: Tensor, scale: Tensor, v: Sequence[Tensor]) -> Check:
        """Compare J.v with the function's slope; where they differ, a backward from the worst row decides."""
        found = slope(self.oracle.exact, v, self.oracle.tolerance) if got.numel() else None
        if found is None:
            note = "left out: no difference can be taken in this precision" if got.numel() else ""
            return self.check(what, Verdict(0.0, self.oracle.tolerance, True, note))
        natural = scale + found.value.abs() + found.value.square().mean().sqrt()
        allowed = self.oracle.tolerance * natural + 8 * (found.error + found.error.square().mean().sqrt())
        distance = torch.nan_to_num((got - found.value).abs(), nan=torch.inf)
        share = torch.where(distance == 0, 0.0, distance / allowed)
        row = int(share.argmax())
        error, bound = (float(t[row] / natural[row]) if natural[row] else 0.0 for t in (distance, allowed))
        if share[row] <= 1:
            note = "" if found.smooth else "not smooth here: two step sizes disagree, so more was allowed"
            return self.check(what, Verdict(error, bound, True, note))
        doubt = _Doubt(row, got[row], scale[row], found.value[row], allowed[row], v)
        return self.check(what, self.row_decides(doubt, Verdict(error, bound, False)))

    def row_decides(self, doubt: _Doubt, seen: Verdict) -> Verdict:
        """Whether one entry of J.v follows the model's own backward, whatever the function's slope says."""
        cotangent = torch.zeros(self.oracle.exact.problem.rows, dtype=torch.float64, device=self.device)
        cotangent[doubt.row] = 1.0

        def entry(point: Point) -> list[Tensor]:
            terms = [(g.double() * t).sum() for g, t in zip(point.pull(cotangent), doubt.direction, strict=True)]
            return [torch.stack(terms).sum()]

        verdict = compare(self.oracle, [doubt.got], [doubt.scale], entry)
        if not verdict.passed:
            return Verdict(seen.error, seen.tolerance, False, f"at row {doubt.row}")
        if bool((entry(self.oracle.exact)[0] - doubt.slope).abs() <= doubt.allowed):
            return verdict
        note = (
            f"the function's slope differs by {seen.error:.1e} from its own backward, which the result follows:"
            " not smooth here, or a backward of the model's own making (detach, a straight-through step)"
        )
        return Verdict(verdict.error, verdict.tolerance, True, note)

    def check(self, what: str, verdict: Verdict, leaves: bool | Sequence[int] = False) -> Check:
        """The verdict as a line for the receipt."""
        notes = [self.oracle.why and f"in the model's own precision: {self.oracle.why}", verdict.note]
        if leaves is not False and not verdict.passed:
            index = verdict.tensor if leaves is True else leaves[verdict.tensor]
            notes.append(f"worst at {self.oracle.exact.problem.leaves[index].key}{list(verdict.entry)}")
        return Check(
            self.sample, what.format(self.oracle.dtype), verdict.error, verdict.tolerance, verdict.passed,
            "; ".join(filter(None, notes)),
        )  # fmt: skip


@dataclass(frozen=True)
class _Doubt:
    """One entry of J.v that differs from the function's slope."""

    row: int
    got: Tensor
    scale: Tensor
    slope: Tensor
    allowed: Tensor
    direction: Sequence[Tensor]


@dataclass(frozen=True)
class _Projected:
    """One block seen along u and v, each with the sum of the squares of the terms that it adds up."""

    pulled: Tensor
    pulled_square: Tensor
    pushed: Tensor
    pushed_square: Tensor


def _project(block: Any, u: Tensor, v: Tensor) -> _Projected:
    """Read the block once, some rows at a time, as float64; a large factored one by its own products."""
    if hasattr(block, "dense") and u.numel() * v.numel() > FACTORED:
        precise = block.double()
        pulled, pushed = precise.vjp(u.reshape(block.out_shape)).reshape(v.shape), precise.jvp(v).reshape(u.shape)
        return _Projected(pulled, pulled.square(), pushed, pushed.square())
    dense = block.dense() if hasattr(block, "dense") else block
    flat = dense.reshape(u.shape[0], v.numel())
    pulled, squared = torch.zeros_like(v).flatten(), torch.zeros_like(v).flatten()
    pushed, pushed_squared = torch.zeros_like(u), torch.zeros_like(u)
    step = max(CHUNK // max(v.numel(), 1), 1)
    for start in range(0, u.shape[0], step):
        rows, here = flat[start : start + step].to(u), slice(start, start + step)
        pulled += u[here] @ rows
        pushed[here] = rows @ v.flatten()
        squares = rows.square()
        squared += u[here].square() @ squares
        pushed_squared[here] = squares @ v.flatten().square()
    return _Projected(pulled.view_as(v), squared.view_as(v), pushed, pushed_squared)


def _summed(point: Point, cotangents: Tensor) -> list[Tensor]:
    """Cotangents `(B, rows)` pulled back one sample at a time: summed for parameters, stacked for other leaves."""
    parts = [
        replace(point, batch=tuple(leaf[i : i + 1] for leaf in point.batch), position=0).pull(k)
        for i, k in enumerate(cotangents)
    ]
    return [
        torch.stack(grads) if own(leaf) else torch.stack(grads).double().sum(0)
        for leaf, grads in zip(point.problem.leaves, zip(*parts, strict=True), strict=True)
    ]


def _mixed(tensors: Any, mix: Tensor) -> Tensor:
    """The combination of K tensors."""
    return torch.einsum("k,k...->...", mix, tensors.to(mix))


def _mixed_size(tensors: Any, mix: Tensor) -> Tensor:
    """The root of the summed squares of the terms of that combination."""
    return torch.einsum("k,k...->...", mix.square(), tensors.to(mix).square()).sqrt()


def _size(value: Tensor) -> float:
    """The root mean square of a leaf's values, 1 for one that is zero."""
    found = float(value.double().square().mean().sqrt()) if value.numel() else 0.0
    return found if 0 < found < float("inf") else 1.0
