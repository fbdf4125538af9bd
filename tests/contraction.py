"""Products of the reference's Jacobian with vectors, by einsum in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Place = tuple[int, int]


def by_place(problem: Any, expected: Any) -> dict[Place, Tensor]:
    """The reference's blocks, a tree of trees, by (output, leaf)."""
    slots = pytree.tree_leaves(problem.out_tree, is_leaf=_none)
    places = pytree.tree_leaves(problem.wrt_tree, is_leaf=_none)
    blocks = pytree.tree_leaves(expected, is_leaf=_none)
    found = {}
    at = 0
    for slot in slots:
        if slot is None:
            # An output without derivative is one None in the reference.
            at += 1
            continue
        for place in places:
            if place is not None:
                found[slot, place] = blocks[at]
            at += 1
    assert at == len(blocks)
    return found


def rows_of(problem: Any, blocks: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """The blocks as `(B, rows, columns)`, with only the entries of an output that were chosen."""
    found = {}
    for (o, i), block in blocks.items():
        out, leaf = problem.outs[o], problem.leaves[i]
        samples = block.shape[0]
        flat = block.reshape(samples, block[0].numel() // max(leaf.size, 1), leaf.size) if block.numel() else None
        flat = torch.zeros(samples, len(out.rows), leaf.size, dtype=torch.float64) if flat is None else flat
        found[o, i] = flat[:, list(out.pick)] if out.pick is not None else flat
    return found


def pulled(problem: Any, rows: dict[Place, Tensor], ks: Sequence[Tensor], reduction: str) -> dict[int, Tensor]:
    """k^T J by leaf, `(K, B, *leaf)` or summed `(K, *param)`; `ks` by output, each `(K, B, *out)`."""
    found: dict[int, Any] = {}
    for (o, i), block in rows.items():
        leaf = problem.leaves[i]
        k = ks[o].double().reshape(*ks[o].shape[:2], -1)
        part = torch.einsum("kbr,brc->kbc", k, block).reshape(*k.shape[:2], *leaf.shape)
        part = part.sum(dim=1) if leaf.side == "param" and reduction == "sum" else part
        found[i] = found.get(i, 0.0) + part
    return found


def pushed(problem: Any, rows: dict[Place, Tensor], vs: Sequence[Tensor]) -> dict[int, Tensor]:
    """J v by output, `(K, B, *out)`; `vs` by leaf, each `(K, B, *leaf)`."""
    found: dict[int, Any] = {}
    for (o, i), block in rows.items():
        v = vs[i].double().reshape(*vs[i].shape[:2], -1)
        part = torch.einsum("brc,kbc->kbr", block, v).reshape(*v.shape[:2], *problem.outs[o].shape)
        found[o] = found.get(o, 0.0) + part
    return found


def tree(structure: Any, values: dict[int, Any] | Sequence[Any]) -> Any:
    """The values in the structure that results have."""
    return pytree.tree_map(lambda i: None if i is None else values[i], structure)


def _none(value: Any) -> bool:
    return value is None
