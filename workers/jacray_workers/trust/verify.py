"""Check what was computed for one sample against an independent path: plain autograd and differences in float64.

Two identities hold for every Jacobian. Pulled back, u.J is one plain backward, so a random u compares a whole block
with one pass. Pushed forward, J.v is the slope of the function along v, which asks autograd nothing at all; where the
function has a kink, or a backward of its own making, the two disagree, and a backward from the row in doubt decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacray_workers.errors import VerificationError
from jacray_workers.problem.problem import Problem
from jacray_workers.shard import Check
from jacray_workers.trust.checker import Checker
from jacray_workers.trust.compare import Oracle
from jacray_workers.trust.reference import points, rounding

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
    gradients: Sequence[Tensor | None] | None = None
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

    def checks(checker: Checker) -> list[Check]:
        found: list[Check] = []
        if computed.jacobian is not None:
            found += checker.jacobian(computed.jacobian)
        if computed.gradients is not None and computed.cotangents is not None:
            found += checker.gradients(computed.cotangents, computed.gradients)
        if computed.pushed is not None and computed.tangents is not None:
            found += checker.pushed(computed.tangents, computed.pushed)
        return found

    return _best(_checker(problem, batch, position, sample, seed, double), checks)


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
    return _best(checker, lambda c: c.gradients(cotangents, result, "summed weighted gradient"))


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
) -> Checker:
    exact, plain, why = points(problem, batch, position, double)
    return Checker(Oracle(exact, plain, why, rounding(problem), seed + sample + 1), sample)


def _best(checker: Checker, work: Callable[[Checker], list[Check]]) -> tuple[Check, ...]:
    """The checks by the strongest checker that the model lets run."""
    while True:
        try:
            return tuple(work(checker))
        except Exception as error:  # noqa: BLE001 - a model may raise anything where it is not usually taken
            checker = checker.weaker(error)
