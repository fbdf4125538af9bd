"""Write sums of outer products into memory that the caller owns: the inner loop of every dense parameter block."""

from __future__ import annotations

import torch
from torch import Tensor

# Matrix products with fewer columns than this run at half the speed of their transposes; the copy back is small.
NARROW = 32
# Multiplications from which a call for a part costs less than to bring all cotangents into the order of one product.
WORTH = 1 << 26


def write_outer(out: Tensor, acts: Tensor, cots: Tensor, flip: bool, add: bool) -> None:
    """Write (or add) `sum_s cots[s] x acts[s]`.

    Args:
        out: `(B, R, G, O, I)`, or `(B, R, G, I, O)` where `flip`; any strides.
        acts: `(B, G, S, I)`.
        cots: `(B, R, G, S, O)`.
        flip: the input features come first.
        add: add to what is there.
    """
    if acts.shape[2] == 1:
        left, right = cots.mT, acts.unsqueeze(1)
        if flip:
            left, right = acts.mT.unsqueeze(1), cots
        _write_single(out, left, right, add)
    elif acts.shape[1] > 1 or not _one_dtype(out, acts, cots):
        add_or_copy(out, _grouped(acts, cots, flip), add)
    elif flip:
        for r in range(out.shape[1]):
            _write_bmm(out[:, r, 0], acts[:, 0].mT, cots[:, r, 0], add)
    else:
        _write_rows(out[:, :, 0], acts[:, 0], cots[:, :, 0], add)


def _write_single(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """One position: a broadcast product runs at the speed of the memory, which a matrix product does not."""
    if add:
        out.addcmul_(left.to(out.dtype), right.to(out.dtype))
    else:
        torch.mul(left, right, out=out)


def _write_rows(out: Tensor, acts: Tensor, cots: Tensor, add: bool) -> None:
    """`out` `(B, R, O, I)`: all rows of a sample in one call, or of all samples where those are small."""
    worth = out[0].numel() * acts.shape[1] >= WORTH
    if not _merge(out) or (worth and out[0].is_contiguous()):
        for target, a, g in zip(out, acts, cots, strict=True):
            _write_sample(target, a.expand(len(g), -1, -1), g, add)
        return
    # Copied so that runs of memory stay together, whichever of positions and features lies innermost.
    rows_last = cots.stride(-1) == 1
    left = cots.transpose(1, 2).flatten(2).mT if rows_last else cots.mT.flatten(1, 2)
    _write_sample(out.flatten(1, 2), acts, left.mT, add)


def _merge(out: Tensor) -> bool:
    """Whether rows and output features of `(B, R, O, I)` lie in memory as one axis."""
    return out.shape[1] == 1 or out.stride(1) == out.shape[2] * out.stride(2)


def _write_sample(out: Tensor, acts: Tensor, cots: Tensor, add: bool) -> None:
    """`out` `(n, O, I)` by `acts` `(n, S, I)` and `cots` `(n, S, O)`."""
    if acts.shape[2] <= NARROW and acts.shape[1] >= 4 * acts.shape[2]:
        add_or_copy(out, torch.bmm(acts.mT, cots).mT, add)
    else:
        _write_bmm(out, cots.mT, acts, add)


def _write_bmm(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    if add:
        out.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=out)


def _grouped(acts: Tensor, cots: Tensor, flip: bool) -> Tensor:
    """`(B, R, G, O, I)` (or `I, O`): rows join the output features, so that small groups make larger products."""
    batch, rows, groups, _, width = cots.shape
    left = cots.permute(0, 2, 1, 4, 3).reshape(batch, groups, rows * width, -1)
    made = left @ acts.to(left.dtype)
    made = made.view(batch, groups, rows, width, made.shape[3]).transpose(1, 2)
    return made.mT if flip else made


def write_eye(out: Tensor, a: Tensor, start: int, add: bool) -> None:
    """Rows of the identity as cotangents: row r of `out` `(B, R, O, I)` holds `a` `(B, I)` at output `start + r`."""
    if not add:
        out.zero_()
    diagonal = out.diagonal(start, dim1=1, dim2=2)
    value = a.to(out.dtype).unsqueeze(2).expand_as(diagonal)
    if add:
        diagonal.add_(value)
    else:
        diagonal.copy_(value)


def add_or_copy(out: Tensor, value: Tensor, add: bool) -> None:
    """`out += value` or `out = value`."""
    if add:
        out.add_(value.to(out.dtype))
    else:
        out.copy_(value)


def _one_dtype(*tensors: Tensor) -> bool:
    return len({t.dtype for t in tensors}) == 1
