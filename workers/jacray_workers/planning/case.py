"""What the planner knows about one job, and what it found out about each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jacray_workers import products
from jacray_workers.plan import ArrayPlan, Candidate
from jacray_workers.planning import memory, pricing, trial
from jacray_workers.planning.ladder import Standing
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.weights import Directions
from jacray_workers.request import Request, budget_bytes

# Output rows that a trial computes at the most, where a method can compute some of them alone; and how many it does at
# the least where their passes are expected to take longer than so many seconds.
TRIAL_ROWS, FEW_ROWS = 64, 16
ROWS_SECONDS = 0.2
# Bytes that those rows of one sample take at the most.
TRIAL_BYTES = 1 << 26
# What vectors in flight may take of the budget, in methods that choose how many to take at a time.
WORKSPACE_SHARE = 1 / 8


@dataclass(frozen=True)
class Case:
    """What the planner knows about one job."""

    problem: Problem
    leaves: Sequence[Tensor]
    request: Request
    arrays: tuple[ArrayPlan, ...]
    workers: int
    work: str
    directions: int
    budget: int
    one: pricing.Forward
    on: pricing.Machine
    batch: list[Tensor]
    known: trial.Reference | None
    standing: Standing
    alike: tuple[bool, ...]
    apart: bool = False

    def apart_for(self, why: str) -> Case:
        """The same job with its samples run one at a time."""
        standing = Standing(False, why, self.standing.notes)
        return dataclasses.replace(self, standing=standing, problem=dataclasses.replace(self.problem, compared=False))

    @property
    def samples(self) -> int:
        """How many samples the job has."""
        return self.leaves[0].shape[0]

    @property
    def rows(self) -> range:
        """The rows that a trial of a row-by-row method computes."""
        return self.known.rows if self.known is not None else range(self.problem.rows)

    @property
    def alone(self) -> bool:
        """Whether plain autograd must be shown one sample at a time."""
        return not self.standing.batched


@dataclass(frozen=True)
class Tried:
    """A candidate with what its trial showed; `line` is None where it was refused or not tried.

    `factored` says which leaves' blocks stay factors, `factor_bytes` how many bytes those take for one
    sample; `count` and `rows` are the samples and rows that it was timed on; `each_row` is what one more row adds to
    the peak of a sample, where that was measured.
    """

    candidate: Candidate
    line: memory.Line | None = None
    factored: tuple[bool, ...] = ()
    cuts: tuple[str, ...] = ()
    factor_bytes: float = 0.0
    count: int = 0
    rows: range = range(0)
    each_row: float | None = None

    def line_at(self, seen: int, rows: int) -> memory.Line:
        """The memory of so many rows, where the line is that of a trial with `seen` rows."""
        line = self.line or memory.Line(0, 0)
        slope = line.slope * rows / seen if self.each_row is None else line.slope + self.each_row * (rows - seen)
        return memory.Line(line.base, max(slope, 0.0))


def directions(problem: Problem, request: Request, ks: Directions | None, vs: Directions | None) -> int:
    """How many cotangents or tangents are in flight at a time."""
    vectors = vs.count if vs else 1
    pushed = vectors if "jvp" in request.returns else 1
    return max(ks.count if ks else 1, pushed, products.width(problem, request, vectors))


def budget_of(request: Request, problem: Problem, workers: int) -> int:
    """Bytes that one worker keeps within: the request's, or a safe share of what is free."""
    free = memory.free_bytes(problem.device)
    if request.memory_budget is None:
        return int(free * memory.SAFE_SHARE / workers)
    return budget_bytes(request.memory_budget, free)


def trial_rows(problem: Problem, work: str, budget: int, row_seconds: float) -> range:
    """Few enough rows that a trial's blocks stay a small part of the budget, and their passes take no long time.

    Args:
        problem: what is differentiated.
        work: which pass.
        budget: bytes.
        row_seconds: what a backward pass from one row of all trial samples is expected to take.
    """
    if work != "jacobian":
        return range(problem.rows)
    wanted = min(TRIAL_ROWS, max(FEW_ROWS, int(ROWS_SECONDS / max(row_seconds, 1e-9))))
    row = sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize * 2
    return range(min(problem.rows, max(1, min(wanted, min(budget // 8, 2 * TRIAL_BYTES) // max(row, 1)))))
