"""Indexing of factored blocks: what only picks samples and rows keeps the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jacray_workers.blocks.block import Block


def take(block: Block, index: Any) -> Tensor:
    """`block[index]`, as factors where the index touches only samples and output axes, with integers and slices.

    A one-dimensional tensor or list of numbers may pick samples. Anything else is applied to the dense form of
    what the leading part of the index leaves.
    """
    parts = _expanded(index if isinstance(index, tuple) else (index,), block.dim())
    if parts is None:
        return block.dense()[index]
    lead = len(block._lead)
    outs = len(block.out_shape)
    first, rows, rest = parts[:lead], parts[lead : lead + outs], parts[lead + outs :]
    if not all(_basic(i) for i in rows + rest) or not all(_basic(i) or _numbers(i) for i in first):
        return block.dense()[index]
    kept = _samples(block, first[0]) if lead else block
    kept = _rows(kept, rows)
    if all(i == slice(None) for i in rest):
        return kept
    return kept.dense()[(..., *rest)]


def _expanded(index: tuple[Any, ...], dims: int) -> list[Any] | None:
    """One entry per axis, or None where the index adds axes or has masks."""
    if any(i is None or isinstance(i, bool) for i in index):
        return None
    if any(isinstance(i, Tensor) and (i.dtype == torch.bool or i.dim() != 1) for i in index):
        return None
    dots = [n for n, i in enumerate(index) if i is Ellipsis]
    if len(dots) > 1 or len(index) - len(dots) > dims:
        raise IndexError(f"too many indices for a block of {dims} axes")
    place = dots[0] if dots else len(index)
    fill = [slice(None)] * (dims - (len(index) - len(dots)))
    return [*index[:place], *fill, *index[place + 1 :]]


def _basic(i: Any) -> bool:
    return isinstance(i, int | slice)


def _numbers(i: Any) -> bool:
    return isinstance(i, Tensor) or (isinstance(i, list) and all(type(n) is int for n in i))


def _samples(block: Block, i: Any) -> Block:
    if i == slice(None) if isinstance(i, slice) else False:
        return block
    if isinstance(i, int):
        if not -block.samples <= i < block.samples:
            raise IndexError(f"sample {i} is out of range: the block has {block.samples}")
        i %= block.samples
        terms = [term.pick(slice(i, i + 1), slice(None)) for term in block.terms]
        return block._like(terms, samples=1, single=True)
    chosen = torch.arange(block.samples)[i]
    picked = i if isinstance(i, slice) else chosen.to(block.device)
    return block._like([term.pick(picked, slice(None)) for term in block.terms], samples=len(chosen))


def _rows(block: Block, rows: list[Any]) -> Block:
    if all(isinstance(i, slice) and i == slice(None) for i in rows):
        return block
    numbers = torch.arange(block.rows).reshape(block.out_shape)[tuple(rows)]
    flat = numbers.flatten()
    first = int(flat[0]) if flat.numel() else 0
    # Consecutive rows are a slice, which copies nothing.
    run = torch.equal(flat, torch.arange(first, first + flat.numel()))
    picked = slice(first, first + flat.numel()) if run else flat.to(block.device)
    terms = [term.pick(slice(None), picked) for term in block.terms]
    return block._like(terms, out_shape=tuple(numbers.shape))
