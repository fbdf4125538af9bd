"""`J_a J_b^T` for samples a and b: blocks of the empirical neural tangent kernel.

Source: R. Novak, J. Sohl-Dickstein and S. Schoenholz, "Fast finite width neural tangent kernel" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacray_workers.blocks.block import Block
from jacray_workers.blocks.terms import Outer
from jacray_workers.products.dense import factored, inner, matrix, pieces, plain, widened

# Rows whose products with each other are made when only equal ones are wanted.
ROWS = 8


def products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """All rows with all rows, summed over leaves: `(n, m, rows, rows)`."""
    found: Tensor | None = None
    for left, right in zip(a, b, strict=True):
        part = _gram(left, right)
        found = part if found is None else found.add_(part)
    if found is None:
        raise ValueError("at least one leaf")
    return found.permute(0, 2, 1, 3)


def traces(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Equal rows only, summed over rows and leaves: `(n, m)`."""
    parts = [_trace(left, right) for left, right in zip(a, b, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """One leaf's `(n, rows, m, rows)`."""
    if factored(a) and factored(b):
        return widened(a.gram(b))
    left, right = (widened(matrix(block)) for block in (a, b))
    product = inner(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *right.shape[:2])


def _trace(a: Tensor, b: Tensor) -> Tensor:
    """One leaf's `(n, m)`."""
    if factored(a) and factored(b):
        return _trace_of_factors(a, b)
    left, right = (widened(plain(block)).flatten(1) for block in (a, b))
    return inner(left, right)


def _trace_of_factors(a: Block, b: Block) -> Tensor:
    """Rows joined with the features of the output where the factors allow it; else a few rows at a time."""
    left, right = _joined(a), _joined(b)
    if left is not None and right is not None:
        return widened(left.gram(right)[:, 0, :, 0])
    found: Tensor | None = None
    for piece in pieces(a.shape[1], 1, ROWS):
        some, others = a[:, piece], b[:, piece]
        if not (factored(some) and factored(others)):
            return widened(plain(a)).flatten(1) @ widened(plain(b)).flatten(1).mT
        part = widened(some.gram(others)).diagonal(dim1=1, dim2=3).sum(dim=2)
        found = part if found is None else found + part
    return found if found is not None else a.new_zeros(a.shape[0], b.shape[0])


def _joined(block: Block) -> Block | None:
    """The block with one row, whose output features are the features of all rows; None where terms do not allow it.

    sum_r (g_r x a) . (h_r x b) = (a . b) (g . h) with g and h over rows and features together.
    """
    found = []
    for t in block.terms:
        if not isinstance(t, Outer) or t.view is not None or t.flip:
            return None
        g = t.explicit_g().permute(0, 2, 1, 3).flatten(2).unsqueeze(1)
        found.append(Outer((g.shape[3], t.own[1]), None, t.a, g))
    return Block(found, (1,), found[0].own, block.dtype) if found else None
