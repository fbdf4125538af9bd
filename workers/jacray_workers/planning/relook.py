"""Whether a plan made for other data of the same shapes still holds: asked now and then, at a small share of the cost.

A plan is used again for new inputs. Samples that were apart in the first data may not be in the next, as where numbers
above some threshold are treated otherwise. The look that the planner takes at full chunks is therefore taken again when
the inputs are new: at the second call, the fourth, the eighth, and whenever the work itself takes far longer.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jacray_workers.plan import Plan
from jacray_workers.planning.ladder import among_many
from jacray_workers.problem.makeup import version
from jacray_workers.problem.problem import Problem

# A look may take this share of the job.
SHARE = 1 / 50
_MEMO = "looked at"


@dataclass
class Looked:
    """What is known of the inputs that came to a plan.

    Attributes:
        inputs: those last looked at, each with how often it was written to.
        calls: how many new ones came since the plan was made.
        seconds: what a look takes.
        broken: some inputs have shown that the plan does not hold.
    """

    inputs: list[tuple[weakref.ref[Tensor], int]]
    calls: int
    seconds: float
    broken: bool = False

    def at(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these are those inputs, and nothing was written to them since."""
        seen = [(ref(), count) for ref, count in self.inputs]
        return len(seen) == len(leaves) and all(
            own is leaf and count == version(leaf) for (own, count), leaf in zip(seen, leaves, strict=True)
        )


def look(problem: Problem, leaves: Sequence[Tensor], plan: Plan) -> str:
    """Why samples in full chunks are not what they are alone, or empty; called inside `problem.session()`."""
    began = time.perf_counter()
    why = among_many(problem, leaves, plan.chunk_size) if plan.batched and not plan.compared else ""
    calls = problem.memo[_MEMO].calls if _MEMO in problem.memo else 1
    problem.memo[_MEMO] = Looked(_inputs(leaves), calls, time.perf_counter() - began)
    return why


def holds(problem: Problem, plan: Plan, leaves: Sequence[Tensor]) -> bool:
    """Whether a plan that was kept may be used for these inputs, as far as was looked."""
    looked: Looked | None = problem.memo.get(_MEMO)
    if looked is None or not plan.batched or plan.compared or plan.chunk_size == 1 or looked.at(leaves):
        return looked is None or not looked.broken
    if looked.broken:
        return False
    looked.calls += 1
    due = looked.calls & (looked.calls - 1) == 0
    if not due and looked.seconds > SHARE * sum(c.seconds for c in plan.candidates if c.method == plan.method):
        looked.inputs = _inputs(leaves)
        return True
    with problem.session():
        why = look(problem, leaves, plan)
    problem.memo[_MEMO].broken = bool(why)
    return not why


def _inputs(leaves: Sequence[Tensor]) -> list[tuple[weakref.ref[Tensor], int]]:
    return [(weakref.ref(leaf), version(leaf)) for leaf in leaves]
