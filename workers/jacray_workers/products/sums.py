"""Sums over samples of `J^T J`, of `J^T H J`, and of their products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers.kernels.common import basis, per_sample, spans
from jacray_workers.problem.problem import Problem
from jacray_workers.products import curvature
from jacray_workers.products.dense import flat_pieces
from jacray_workers.products.needs import WIDTH

# Columns of a symmetric product that are multiplied at a time: the part left of them is known by symmetry.
STRIPE = 512


class Gram:
    """One chunk's sum of `J^T J`, or of `J^T H J`, from its blocks, some rows at a time.

    Args:
        columns: of the Jacobian over all leaves.
        p: the softmax `(b, positions, classes)` in H = diag(p) - p p^T; None for the identity.
        piece: bytes that intermediates may take.
    """

    def __init__(self, columns: int, p: Tensor | None, piece: int) -> None:
        self.columns, self.p, self.piece = columns, p, piece
        self.centre: Tensor | None = None
        self.total: Tensor | None = None

    def look(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """See some rows before any is taken: the mean row must be complete first."""
        if self.p is None:
            return
        for piece, part in flat_pieces(blocks, self.piece):
            if self.centre is None:
                self.centre = part.new_zeros(*self.p.shape[:2], self.columns)
            curvature.add_centre(self.centre[piece], self.p[piece], rows, part)

    def take(self, rows: range, blocks: Sequence[Tensor]) -> None:
        """Add what some rows contribute."""
        for piece, part in flat_pieces(blocks, self.piece, 3):
            if self.total is None:
                self.total = part.new_zeros(self.columns, self.columns)
            a = part
            if self.p is not None and self.centre is not None:
                a = curvature.root_times(self.p[piece], self.centre[piece], rows, part)
            add_upper(self.total, a.reshape(-1, self.columns))

    def pairs(self, problem: Problem) -> dict[tuple[int, int], Tensor]:
        """The matrix by pairs of leaves: `(*leaf, *leaf)`."""
        leaves = problem.leaves
        if self.total is None:
            self.total = torch.zeros(self.columns, self.columns, dtype=problem.dtype, device=problem.device)
        mirror(self.total)
        parts = self.total.split([leaf.size for leaf in leaves])
        return {
            (i, j): block.reshape(*leaves[i].shape, *leaves[j].shape)
            for i, part in enumerate(parts)
            for j, block in enumerate(part.split([leaf.size for leaf in leaves], dim=1))
        }


def add_upper(total: Tensor, a: Tensor) -> None:
    """Add `a^T a` to the upper triangle, and to no more below it than the stripes on the diagonal hold."""
    for low in range(0, total.shape[0], STRIPE):
        total[low : low + STRIPE, low:].addmm_(a[:, low : low + STRIPE].T, a[:, low:])


def mirror(total: Tensor) -> None:
    """Copy the upper triangle to the lower one, so that the matrix is symmetric to the bit."""
    for low in range(0, total.shape[0], STRIPE):
        high = low + STRIPE
        corner = total[low:high, low:high]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[high:, low:high] = total[low:high, high:].T


def times_vectors(
    problem: Problem, kernel: Any, batch: Sequence[Tensor], vectors: Sequence[Tensor], p: Tensor | None
) -> list[Tensor]:
    """This chunk's sum over samples of `J^T H (J v)`, per leaf `(K, *leaf)` in float64: a jvp, then a vjp.

    Args:
        problem: what is differentiated.
        kernel: the method's module.
        batch: the placed inputs.
        vectors: per leaf `(K, b, *leaf)`.
        p: the softmax in H; None for the identity.
    """

    def product(span: range) -> list[Tensor]:
        pushed = kernel.jvp(problem, batch, [v[span.start : span.stop] for v in vectors])
        return _pull(problem, kernel, batch, curvature.times(p, pushed))

    return _in_spans(vectors[0].shape[0], product)


def row_sums(problem: Problem, kernel: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    """This chunk's sum over samples of the Jacobian, per leaf `(rows, *leaf)` in float64.

    One pass of the whole batch per row; no parameter's Jacobian is ever held per sample.
    """
    size = batch[0].shape[0]
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)

    def product(span: range) -> list[Tensor]:
        ones = basis(span, problem.rows, like).unsqueeze(1)
        return _pull(problem, kernel, batch, ones.expand(-1, size, -1))

    if problem.rows == 0:
        return [like.new_zeros(0, *leaf.shape, dtype=torch.float64) for leaf in problem.leaves]
    return _in_spans(problem.rows, product)


def _pull(problem: Problem, kernel: Any, batch: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """`(K, b, rows)` pulled back and summed over samples: per leaf `(K, *leaf)`."""
    found = kernel.vjp(problem, batch, cotangents, per_sample_params=False)
    return [
        grad.sum(dim=1, dtype=torch.float64) if per_sample(leaf) else grad.double()
        for leaf, grad in zip(problem.leaves, found, strict=True)
    ]


def _in_spans(count: int, product: Callable[[range], list[Tensor]]) -> list[Tensor]:
    """The parts of `count` directions, some at a time, one after the other."""
    found: Iterator[list[Tensor]] = (product(span) for span in spans(range(count), WIDTH))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
