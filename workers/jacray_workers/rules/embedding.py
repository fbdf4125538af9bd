"""Rows of a table chosen by number."""

from __future__ import annotations

import torch
from torch import Tensor

from jacray_workers.blocks.terms import Lookup
from jacray_workers.rules.common import Terms, Unfit, Use, by_sample
from jacray_workers.taps.sites import Path, defeat

FUNCTIONAL = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
LOW = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
SELECT = ("weight", "dim", "input")
GETITEM = ("weight", "input")


def embedding(use: Use) -> Terms:
    """`F.embedding` and the operator below it.

    Raises:
        MethodError: the call changes the table, or defines a gradient that is no derivative.
    """
    if use.value("max_norm", None) if "max_norm" in use.names else None:
        raise defeat("an embedding with max_norm changes its weight on every call")
    if use.value("scale_grad_by_freq", False):
        raise defeat("scale_grad_by_freq makes a gradient that is no derivative")
    table = use.source("weight")
    padding = use.value("padding_idx", None)
    rows = use.own(table)[0] if table is not None else 0
    # The lower operator writes -1 for none; the functional one counts negative numbers from the end.
    if padding is not None and padding < 0:
        padding = None if use.names == LOW else padding + rows
    return _lookup(use, padding)


def select(use: Use) -> Terms:
    """`p.index_select(0, index)`."""
    if use.value("dim") != 0:
        raise Unfit("dim")
    return _lookup(use)


def getitem(use: Use) -> Terms:
    """`p[index]` with a tensor of whole numbers."""
    index = use.value("input")
    inner: Path = (1, 0) if isinstance(index, tuple) and len(index) == 1 else (1,)
    numbers = index[0] if inner == (1, 0) else index
    if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int64, torch.int32):
        raise Unfit("index")
    return _lookup(use, inner=inner)


def _lookup(use: Use, padding: int | None = None, inner: Path | None = None) -> Terms:
    table, path = use.source("weight"), inner or use.path("input")
    if table is None or path is None or path in use.tap.sources or use.tap.site.fits.get(path) is None:
        raise Unfit("table")
    own = use.own(table)
    index = by_sample(use.tap, path).flatten(1).long()
    index = torch.where(index < 0, index + own[0], index)
    axis = use.tap.site.axis(path)
    if axis is None or axis.dim != use.out_axis.dim:
        raise Unfit("batch")
    g = use.cots.reshape(*use.cots.shape[:2], index.shape[1], -1)
    if padding is not None:
        g = g.masked_fill((index == padding)[:, None, :, None], 0)
    return {table: Lookup(own, None, index=index, g=g)}
