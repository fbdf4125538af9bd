"""Whether the samples of a chunk give what they give alone: asked of every chunk where a few samples prove nothing.

A model that reads values of a mask may take another path for a batch than for a sample. The outputs are compared, and
one random cotangent per sample pulled back: any use of one sample's numbers in another's outputs shows in either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacray_workers.errors import MethodError
from jacray_workers.kernels import backward_loop
from jacray_workers.kernels.common import singly
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import place
from jacray_workers.trust.evidence import largest, relative
from jacray_workers.trust.reference import generator, normal, own

# Beyond rounding, relative to a sample's outputs or a leaf's gradient. What is turned away by mistake loses time only.
ALIKE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Gradients this much smaller than the largest of the chunk are rounding of the others.
FLOOR = 1e-3


def alike(problem: Problem, batch: Sequence[Tensor]) -> bool:
    """Whether every sample among these has the outputs and the derivative that it has alone.

    Args:
        problem: what is differentiated; called inside its session.
        batch: the placed input leaves of the chunk.
    """
    size = batch[0].shape[0]
    if size == 1:
        return True
    u = normal(torch.empty(size, problem.rows), generator(problem.seed)).to(problem.device, problem.dtype)
    try:
        among = _pulled(problem, batch, u)
        parts = (_pulled(problem, sample, u[i : i + 1]) for i, sample in enumerate(singly(batch)))
        return _same(problem, among, parts)
    except MethodError:
        return False  # no backward, so nothing to compare


@dataclass(frozen=True)
class _Pulled:
    """Outputs `(B, rows)`, and per leaf the gradient `(B, *leaf)`, or `(*param)` summed over the samples."""

    y: Tensor
    grads: list[Tensor]


def _pulled(problem: Problem, batch: Sequence[Tensor], u: Tensor) -> _Pulled:
    def use(values: Sequence[Tensor], y: Tensor, pull: backward_loop.Pull) -> _Pulled:
        return _Pulled(y.detach(), pull(y, values, u, False))

    return backward_loop.on_graph(problem, batch, use)


def _same(problem: Problem, among: _Pulled, parts: Iterable[_Pulled]) -> bool:
    """Compare each sample as it comes: of parameters only the sum is held."""
    allowed = ALIKE[problem.dtype]
    floors = [FLOOR * size if grad.numel() and (size := largest(grad)) < math.inf else 0.0 for grad in among.grads]
    sums = [
        torch.zeros_like(grad) if not own(leaf) else None
        for leaf, grad in zip(problem.leaves, among.grads, strict=True)
    ]
    for i, part in enumerate(parts):
        for out in problem.outs:
            rows = slice(out.rows.start, out.rows.stop)
            if relative(among.y[i, rows], part.y[0, rows]) > allowed:
                return False
        for grad, alone, total, floor in zip(among.grads, part.grads, sums, floors, strict=True):
            if total is not None:
                total.add_(alone)
            elif relative(grad[i], alone[0], floor) > allowed:
                return False
    whole = zip(among.grads, sums, floors, strict=True)
    return all(total is None or relative(grad, total, floor) <= allowed for grad, total, floor in whole)


class Judge:
    """Decides, chunk by chunk, whether the samples ahead go together.

    Args:
        problem: what is differentiated; only where it is `compared` there is anything to decide.
        leaves: the job's input leaves.

    Attributes:
        alone: how many samples were sent one at a time.
    """

    def __init__(self, problem: Problem, leaves: Sequence[Tensor]) -> None:
        self.alone = 0
        self._problem, self._leaves = problem, leaves
        self._apart_until = 0

    def stop(self, start: int, stop: int) -> int:
        """Where the chunk that begins at `start` ends: where it was to, or behind its first sample."""
        if not self._problem.compared:
            return stop
        if start >= self._apart_until:
            batch = place(self._problem, [leaf[start:stop] for leaf in self._leaves])
            if alike(self._problem, batch):
                return stop
            self._apart_until = stop
        self.alone += 1
        return start + 1
