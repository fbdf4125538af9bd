"""The checks of one sample: what was computed, against a plain backward and against the function's slope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacray_workers.shard import Check
from jacray_workers.trust.compare import Oracle, Reference, Verdict, compare
from jacray_workers.trust.projection import mixed, mixed_size, project, size_of, summed
from jacray_workers.trust.reference import Point, generator, normal, wide
from jacray_workers.trust.slope import slope


@dataclass(frozen=True)
class _Doubt:
    """One entry of J.v that differs from the function's slope."""

    row: int
    got: Tensor
    scale: Tensor
    slope: Tensor
    allowed: Tensor
    direction: Sequence[Tensor]


class Checker:
    """The checks of one sample, or of a sum over samples.

    Args:
        oracle: what results are compared with.
        sample: its number in the job; -1 for a sum. It decides the directions, together with the oracle's seed.
        blind: why plain autograd does not run at all, or the empty string.
    """

    def __init__(self, oracle: Oracle, sample: int, blind: str = "") -> None:
        self.oracle, self.sample, self.blind = oracle, sample, blind
        self.source = generator(oracle.seed)
        self.device = oracle.exact.problem.device

    def weaker(self, error: Exception) -> Checker:
        """The next best checker after this one met an error: in the model's own precision, then without autograd.

        Raises:
            Exception: the error, where there is no other checker.
        """
        if self.blind:
            raise error
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        if self.oracle.why:
            return Checker(self.oracle, self.sample, why)
        own_precision = replace(self.oracle, exact=self.oracle.plain, why=f"the model does not run in float64 ({why})")
        return Checker(own_precision, self.sample)

    def widened(self, batch: Sequence[Tensor]) -> Checker:
        """The same checks with points that hold a whole batch."""
        plain = replace(self.oracle.plain, batch=tuple(batch))
        exact = replace(self.oracle.exact, batch=tuple(wide(leaf) for leaf in batch))
        oracle = replace(self.oracle, exact=plain if self.oracle.exact is self.oracle.plain else exact, plain=plain)
        return Checker(oracle, self.sample)

    def weights(self, count: int) -> Tensor:
        """Random numbers, none close to zero and no two alike: a fault in any one row shows, and so does a swap."""
        sign = torch.randint(2, (count,), generator=self.source) * 2 - 1
        return (sign * (0.5 + torch.rand(count, dtype=torch.float64, generator=self.source))).to(self.device)

    def tangent(self) -> list[Tensor]:
        """A random direction for every leaf, of the size of the leaf's values."""
        exact = self.oracle.exact
        values = [exact.at(leaf, value) for leaf, value in zip(exact.problem.leaves, exact.values(), strict=True)]
        return [normal(value.double(), self.source) * size_of(value) for value in values]

    def compare(self, got: Sequence[Tensor], scale: Sequence[Tensor], reference: Reference) -> Verdict:
        """Compare with a reference, where there is one."""
        if self.blind:
            return Verdict(0.0, self.oracle.tolerance, True, f"left out: plain autograd does not run ({self.blind})")
        return compare(self.oracle, got, scale, reference)

    def jacobian(self, blocks: Sequence[Any]) -> list[Check]:
        """A whole Jacobian: pulled back by a random u, pushed forward along a random v."""
        u, v = self.weights(self.oracle.exact.problem.rows), self.tangent()
        parts = [project(block, u, direction) for block, direction in zip(blocks, v, strict=True)]
        pulled, pulled_scale = [p.pulled for p in parts], [p.pulled_square.sqrt() for p in parts]
        verdict = self.compare(pulled, pulled_scale, lambda point: point.pull(u))
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
        got = [mixed(gradients[i], mix) for i in kept]
        scale = [mixed_size(gradients[i], mix) for i in kept]
        k = mixed(cotangents, mix)

        def pull(point: Point) -> list[Tensor]:
            found = point.pull(k) if k.dim() == 1 else summed(point, k)
            return [found[i] for i in kept]

        verdict = self.compare(got, scale, pull)
        return [self.check(f"{name} against a {{}} backward", verdict, kept)]

    def pushed(self, tangents: Sequence[Tensor], pushed: Tensor) -> list[Check]:
        """Tangents pushed forward: a random combination against backwards, and against the function's slope."""
        mix = self.weights(pushed.shape[0])
        v = [mixed(tangent, mix) for tangent in tangents]
        got, scale = mixed(pushed, mix), mixed_size(pushed, mix)
        u = self.weights(got.shape[0])

        def adjoint(point: Point) -> list[Tensor]:
            terms = [g.double() * t for g, t in zip(point.pull(u), v, strict=True)]
            return [torch.stack([term.sum() for term in terms]).sum()]

        verdict = self.compare([(u * got).sum()], [(u * scale).square().sum().sqrt()], adjoint)
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
        if self.blind:
            note = f"at row {row}" if found.smooth else "not smooth here, and nothing else to compare with"
            return self.check(what, Verdict(error, bound, not found.smooth, note))
        doubt = _Doubt(row, got[row], scale[row], found.value[row], allowed[row], v)
        return self.check(what, self.row_decides(doubt, Verdict(error, bound, False)))

    def row_decides(self, doubt: _Doubt, seen: Verdict) -> Verdict:
        """Whether one entry of J.v follows the model's own backward, whatever the function's slope says."""
        cotangent = torch.zeros(self.oracle.exact.problem.rows, dtype=torch.float64, device=self.device)
        cotangent[doubt.row] = 1.0

        def entry(point: Point) -> list[Tensor]:
            terms = [(g.double() * t).sum() for g, t in zip(point.pull(cotangent), doubt.direction, strict=True)]
            return [torch.stack(terms).sum()]

        verdict = self.compare([doubt.got], [doubt.scale], entry)
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
