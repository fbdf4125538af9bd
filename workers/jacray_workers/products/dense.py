"""Blocks as plain matrices: one row per output number, one column per number of a leaf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from jacray_workers.blocks.block import Block, DenseBlock

# Columns whose products are summed in one go, and numbers that the parts of a sum may hold.
SLICE = 1 << 14
PARTIAL = 1 << 22


def plain(block: Tensor) -> Tensor:
    """The block as a plain tensor, made dense where it is held in factors."""
    return block.dense() if isinstance(block, Block) else block


def factored(block: Tensor) -> TypeGuard[Block]:
    """Whether the block is held in factors."""
    return isinstance(block, Block) and not isinstance(block, DenseBlock)


def matrix(block: Tensor) -> Tensor:
    """One leaf's block as `(b, rows, columns)`, a view where it is dense already."""
    dense = plain(block)
    return dense.reshape(*dense.shape[:2], dense.shape[2:].numel())


def flat(blocks: Sequence[Tensor]) -> Tensor:
    """All leaves side by side: `(b, rows, columns)`; half precisions in float32, in which products are made."""
    parts = [matrix(block) for block in blocks]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return widened(whole)


def widened(t: Tensor) -> Tensor:
    """Half precisions as float32."""
    return t.float() if t.dtype.itemsize < 4 else t


def flat_pieces(blocks: Sequence[Tensor], limit: int, copies: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """A few samples at a time of all leaves side by side, so that `copies` of each piece stay within `limit` bytes."""
    numbers = sum(block.shape[1:].numel() for block in blocks)
    for piece in pieces(blocks[0].shape[0], 8 * numbers * copies, limit):
        yield piece, flat([block[piece] for block in blocks])


def inner(a: Tensor, b: Tensor) -> Tensor:
    """`a b^T` for `(m, columns)` and `(n, columns)`.

    Many columns go in slices whose products are added up: where there are few rows, one matrix product keeps neither
    the caches nor the threads of a CPU busy, and sums that long lose two digits of float32.
    """
    if a.shape[1] <= SLICE:
        return a @ b.mT
    found = a.new_zeros(a.shape[0], b.shape[0])
    count = max(1, PARTIAL // max(1, found.numel()))
    whole = a.shape[1] - a.shape[1] % SLICE
    for low in range(0, whole, count * SLICE):
        left, right = (
            t[:, low : min(low + count * SLICE, whole)].unflatten(1, (-1, SLICE)).transpose(0, 1) for t in (a, b)
        )
        found += (left @ right.mT).sum(dim=0)
    return found.addmm_(a[:, whole:], b[:, whole:].mT)


def bytes_of(block: Tensor) -> int:
    """Bytes that a block holds on to."""
    return block.nbytes_factored if isinstance(block, Block) else block.numel() * block.element_size()


def pieces(count: int, each: int, limit: int) -> Iterator[slice]:
    """Slices of `count` things of `each` bytes, as many at a time as stay within `limit`, one at least."""
    step = max(1, limit // max(each, 1))
    for low in range(0, count, step):
        yield slice(low, min(low + step, count))
