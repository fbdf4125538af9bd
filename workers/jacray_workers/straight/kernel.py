"""The short way of `chain`: what it needs of a problem, and its blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jacray_workers.kernels.common import note_bound
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.state import modules_of
from jacray_workers.straight import running
from jacray_workers.straight.order import Step, solve
from jacray_workers.straight.reading import Line, read
from jacray_workers.straight.running import Passage
from jacray_workers.straight.watching import watch
from jacray_workers.trust.finite import largest

# In a problem's memo: its calls were watched, and are no plain net's.
WINDING = "winding"


@dataclass(frozen=True)
class Short:
    """A problem that is a plain net differentiated with respect to its input.

    Attributes:
        line: the net as it stands.
        x: its input, `(B, *in)`.
        outputs: which of its outputs are asked for; None for all.
        passage: the batch's way through it, where that is known already.
    """

    line: Line
    x: Tensor
    outputs: Sequence[int] | None
    passage: Passage | None = None

    @property
    def step(self) -> Step:
        """The order of its products."""
        widths, bent = self.line.make
        count = widths[-1] if self.outputs is None else len(self.outputs)
        return solve((*widths[:-1], count), bent, self.x.shape[0])

    @property
    def operations(self) -> float:
        """For the batch: the forward pass, and the products."""
        passing = sum(2.0 * a * b for a, b in itertools.pairwise(self.line.widths))
        return self.x.shape[0] * passing + self.step.operations

    @property
    def text(self) -> str:
        """The order as one sentence."""
        return f"a plain net of {len(self.line.weights)} weights, multiplied as {_bracketed(self.step)}"


def short(problem: Problem, batch: Sequence[Tensor]) -> Short | None:
    """The plain net that a problem is; None where it is another, or where more is asked than its Jacobian.

    To be called inside `problem.session()`.
    """
    if problem.training or problem.random or problem.point is not None or len(batch) != 1:
        return None
    if len(problem.leaves) != 1 or problem.leaves[0].side != "input" or len(problem.outs) != 1:
        return None
    line, passage = read(problem.module, problem.tensors), None
    if line is None:
        line, passage = _watched(problem, batch[0])
    if line is None or not line.takes(batch[0]) or line.weights[0].dtype is not problem.dtype:
        return None
    return Short(line, batch[0], problem.outs[0].pick, passage)


def _watched(problem: Problem, x: Tensor) -> tuple[Line, Passage] | tuple[None, None]:
    """The net that a model's calls show; of one that showed another once no more is asked."""
    habits = problem.stateful, problem.writes, problem.written, problem.differentiates, problem.branches
    if any(habits) or problem.compared or WINDING in problem.memo:
        return None, None
    parts = modules_of(problem.module)
    own = {id(p): "" for part in parts for p in part._parameters.values()}
    own |= dict.fromkeys(map(id, problem.tensors.values()), "")
    seen = None
    if not any(part._backward_hooks or part._backward_pre_hooks for part in parts):
        try:
            seen = watch(lambda start: problem.call_model([start], [x]), x, own)
        except Exception as error:
            if out_of_memory(error):
                raise
    if seen is None:
        problem.memo[WINDING] = True
        return None, None
    return seen.line, seen.passage


def fill(found: Short, wanted: range, targets: list[Tensor]) -> None:
    """Write the rows `wanted` of the one block, `(B, rows, numbers of the input)`."""
    every = range(found.line.widths[-1]) if found.outputs is None else found.outputs
    rows = None if len(wanted) == found.line.widths[-1] else every[wanted.start : wanted.stop]
    factors = running.jacobian(found.line, found.x, targets[0], rows, found.passage)
    if factors and sum(factor.numel() for factor in factors) < targets[0].numel() / 2:
        left, right = factors
        note_bound(targets, 0, largest(left) * left.shape[-1] * largest(right))


def _bracketed(step: Step) -> str:
    if step.left is None or step.right is None:
        return f"W{step.stop}"
    inner = f"{_bracketed(step.left)} {_bracketed(step.right)}"
    return f"({inner})"
