"""Products of vectors with blocks that are there anyway: what a jvp or a vjp pass would give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacray_workers.products.dense import factored, matrix, widened


def push(blocks: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """J v: `(K, b, rows)` from blocks `(b, rows, *leaf)` and vectors `(K, b, *leaf)`, summed over leaves."""
    parts = [_push(block, v) for block, v in zip(blocks, vectors, strict=True)]
    return torch.stack(parts).sum(dim=0)


def pull(blocks: Sequence[Tensor], u: Tensor, summed: Sequence[bool]) -> list[Tensor]:
    """u^T J: per leaf `(K, b, *leaf)`, or `(K, *leaf)` where `summed` over samples; `u` is `(K, b, rows)`."""
    return [_pull(block, u, over) for block, over in zip(blocks, summed, strict=True)]


def _push(block: Tensor, v: Tensor) -> Tensor:
    if factored(block):
        return torch.stack([widened(block.jvp(one.contiguous())) for one in v])
    rows = widened(matrix(block))
    columns = v.flatten(2) if v.dim() > 2 else v.unsqueeze(2)
    return (rows @ columns.to(rows.dtype).permute(1, 2, 0)).permute(2, 0, 1)


def _pull(block: Tensor, u: Tensor, summed: bool) -> Tensor:
    if factored(block):
        parts = [widened(block.vjp(one)) for one in u]
        return torch.stack([part.sum(dim=0) if summed else part for part in parts])
    rows = widened(matrix(block))
    u = u.to(rows.dtype)
    if summed:
        found = u.flatten(1) @ rows.flatten(0, 1)
        return found.reshape(u.shape[0], *block.shape[2:])
    found = (u.permute(1, 0, 2) @ rows).transpose(0, 1)
    return found.reshape(*u.shape[:2], *block.shape[2:])
