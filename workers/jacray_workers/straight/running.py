"""Carry out an order: one forward pass for the diagonals, then the products, the last one straight into the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacray_workers.kernels.matmul import layer
from jacray_workers.straight.order import Step, solve
from jacray_workers.straight.reading import Line

_gated: Any = torch.ops.aten.threshold_backward.default
_gated_into: Any = torch.ops.aten.threshold_backward.grad_input
# Columns below which a matrix product is several times slower than with its matrix laid out the other way.
NARROW = 16


class Diagonal(NamedTuple):
    """The derivatives at one width, `(B, width)`; of a gate the values, which let through where they are above 0."""

    numbers: Tensor
    gate: bool

    def on_columns(self, matrix: Tensor, *, fresh: bool) -> Tensor:
        """`matrix`, `(B, o, width)` or shared, times it; in place where that is our own."""
        return self._scale(matrix, self.numbers.unsqueeze(1), fresh=fresh)

    def on_rows(self, matrix: Tensor, *, fresh: bool) -> Tensor:
        """It times `matrix`, `(B, width, i)` or shared."""
        return self._scale(matrix, self.numbers.unsqueeze(2), fresh=fresh)

    def factors(self) -> Tensor:
        """The derivatives themselves."""
        return self._scale(torch.ones_like(self.numbers), self.numbers, fresh=True) if self.gate else self.numbers

    def after(self, before: Diagonal | None) -> Diagonal:
        """Both, one behind the other."""
        return self if before is None else Diagonal(self._scale(before.factors(), self.numbers, fresh=False), False)

    def _scale(self, matrix: Tensor, numbers: Tensor, *, fresh: bool) -> Tensor:
        if self.gate:
            # Not a product: what is off is 0 even where a weight is infinite, as in torch's own backward.
            made: Tensor = _gated_into(matrix, numbers, 0, grad_input=matrix) if fresh else _gated(matrix, numbers, 0)
            return made
        return matrix.mul_(numbers) if fresh else matrix * numbers


class Passage(NamedTuple):
    """A batch's way through a net.

    Attributes:
        acts: what each weight was multiplied with, `(B, in)`, as far as it is known.
        diagonals: what the functions at each width, before each weight and behind the last, make of the batch.
    """

    acts: list[Tensor]
    diagonals: list[Diagonal | None]


def jacobian(
    line: Line,
    x: Tensor,
    into: Tensor,
    rows: Sequence[int] | range | None = None,
    passage: Passage | None = None,
) -> tuple[Tensor, ...]:
    """The Jacobian of a net at a batch, written to `into`.

    Args:
        line: the net as it stands.
        x: `(B, *in)`, what `line.takes`.
        into: contiguous, `(B, outputs, numbers of one sample's input)`.
        rows: which outputs; all by default.
        passage: the batch's way through the net, where it is known.

    Returns:
        The two factors where the result is a product of theirs and nothing more: they bound it. Else nothing.
    """
    with torch.no_grad():
        known = passed(line, x) if passage is None else passage
        return _Work(line, known.diagonals, x.shape[0], rows).run(into)


class _Work:
    """One batch on its way."""

    def __init__(
        self, line: Line, diagonals: list[Diagonal | None], samples: int, rows: Sequence[int] | range | None
    ) -> None:
        self.samples = samples
        self.factors: tuple[Tensor, ...] = ()
        self.weights = line.weights
        self.diagonals = diagonals
        widths, bent = line.make
        if rows is not None:
            chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
            self.weights = [*line.weights[:-1], line.weights[-1][chosen]]
            end = diagonals[-1]
            last = None if end is None else Diagonal(end.numbers[:, chosen], end.gate)
            self.diagonals = [*diagonals[:-1], last]
            widths = (*widths[:-1], self.weights[-1].shape[0])
        self.order = solve(widths, bent, self.samples)

    def run(self, into: Tensor) -> tuple[Tensor, ...]:
        """All of it."""
        first, last = self.diagonals[0], self.diagonals[-1]
        self._make(self.order, into)
        if last is not None:
            last.on_rows(into, fresh=True)
        if first is not None:
            first.on_columns(into, fresh=True)
        return self.factors if first is None and last is None else ()

    def _make(self, step: Step, into: Tensor | None = None) -> Tensor:
        """The Jacobian of a step: `(o, i)` where it is shared, else `(B, o, i)`; `into` is filled where given."""
        if step.left is None or step.right is None:
            made = self.weights[step.start]
        else:
            made = self._product(step, self._make(step.left), self._make(step.right), into)
        if into is not None and made is not into:
            into.copy_(made)
        return made

    def _product(self, step: Step, left: Tensor, right: Tensor, into: Tensor | None) -> Tensor:
        diagonal = self.diagonals[step.at]
        if step.how == "spread" and diagonal is not None:
            return self._spread(left, right, diagonal, into)
        if step.how in ("columns", "back"):
            left = left if diagonal is None else diagonal.on_columns(left, fresh=left.dim() == 3)
        elif step.how == "pairs" and diagonal is not None and left.numel() <= right.numel():
            diagonal.on_columns(left, fresh=True)
        elif diagonal is not None:
            right = self._rows_scaled(right, diagonal)
        self.factors = left, right
        if step.how == "merge":
            return torch.mm(left, right)
        if right.dim() == 2:
            return _times_shared(left, right, into)
        if step.turned:
            # Its columns are the rows of one large product.
            return _times_shared(right.mT, left.mT, None).mT
        left = left.expand(self.samples, -1, -1)
        return torch.bmm(left, right) if into is None else torch.bmm(left, right, out=into)

    def _rows_scaled(self, right: Tensor, diagonal: Diagonal) -> Tensor:
        """A matrix with its rows scaled; a shared one becomes each sample's own, lying column by column."""
        if right.dim() == 3:
            return diagonal.on_rows(right, fresh=True)
        return diagonal.on_columns(right.mT.contiguous(), fresh=False).mT

    def _spread(self, left: Tensor, right: Tensor, diagonal: Diagonal, into: Tensor | None) -> Tensor:
        """All samples at once: their diagonals `(B, k)` times `A[o,k] B[k,i]`."""
        o, i = left.shape[0], right.shape[1]
        pairs = torch.mul(left.unsqueeze(1), right.mT, out=left.new_empty(o, i, left.shape[1])).view(o * i, -1).mT
        self.factors = diagonal.factors(), pairs
        if into is None:
            return torch.mm(*self.factors).view(self.samples, o, i)
        torch.mm(*self.factors, out=into.view(self.samples, o * i))
        return into


def _times_shared(own: Tensor, shared: Tensor, into: Tensor | None) -> Tensor:
    """`(B, m, k)`, in order in memory, times a matrix that all samples share, as one product."""
    samples, m, k = own.shape
    if shared.shape[1] < NARROW and shared.stride(1) == 1:
        shared = shared.mT.contiguous().mT
    if into is None:
        return torch.mm(own.reshape(samples * m, k), shared).view(samples, m, -1)
    torch.mm(own.reshape(samples * m, k), shared, out=into.view(samples * m, -1))
    return into


def passed(line: Line, x: Tensor, *, whole: bool = False) -> Passage:
    """Take a batch through a net, as far as the derivative with respect to it needs.

    Args:
        line: the net.
        x: `(B, *in)`, what `line.takes`.
        whole: go up to the last weight in any case: the derivatives with respect to weights need that.
    """
    h = x if x.dim() == 2 else x.flatten(1)
    acts: list[Tensor] = []
    found: list[Diagonal | None] = [None] * len(line.gaps)
    last = max((at for at, gap in enumerate(line.gaps) if gap), default=-1)
    end = max(last, len(line.weights) - 1) if whole else last
    for at in range(end + 1):
        for curve, part in line.gaps[at]:
            y = curve.value(part, h)
            found[at] = Diagonal(curve.slope(part, h, y), curve.gate).after(found[at])
            h = y
        acts.append(h)
        if at < end:
            h = layer(h, line.weights[at], line.biases[at])
    return Passage(acts, found)
