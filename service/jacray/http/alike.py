"""Pieces of work whose messages differ in their numbers alone: read, joined and answered as arrays, not one by one.

Requests of one kind that hold equally many samples have the same header to the byte. So their bodies lie in memory as
the rows of a matrix, each tensor as some columns of it, and so do their answers: a batch costs the same few operations
however many pieces it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jacray_workers.again import Batch
from jacray_workers.engine import Prepared
from jacray_workers.plan import Plan
from jacray_workers.request import Request
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray.http.messages import DTYPES, Message, raw, tree
from jacray.http.wire import Header
from jacray.http.work import DIRECTIONS


def stacked(header: Header, payload: bytearray | memoryview, count: int) -> dict[str, Tensor]:
    """Each tensor of equally long messages that lie one after another: `(count, *shape)`, in memory of its own."""
    rows = np.frombuffer(payload, np.uint8, count * header.total).reshape(count, header.total)
    found = {}
    for entry in header.entries:
        columns = np.ascontiguousarray(rows[:, header.size + entry.start : header.size + entry.stop])
        found[entry.name] = _as_tensor(columns, DTYPES[entry.dtype]).reshape(count, *entry.shape)
    return found


def _as_tensor(columns: Any, dtype: torch.dtype) -> Tensor:
    if columns.size == 0:
        return torch.empty(columns.shape, dtype=dtype)
    given = torch.from_numpy(columns if columns.flags.owndata else columns.copy())
    # Any byte may stand for a bool, and one that is neither 0 nor 1 breaks what torch relies on.
    return given != 0 if dtype == torch.bool else given.view(dtype)


def joined(prepared: Prepared, about: Mapping[str, Any], known: Mapping[str, Tensor], first: Request) -> Batch | None:
    """The work of all pieces as one batch, sample after sample, or None where that is not told from shapes alone.

    Args:
        prepared: the work of the first piece.
        about: what every piece says besides its tensors.
        known: the tensors, `(pieces, *shape)`.
        first: the request of the first piece.
    """
    inputs = pytree.tree_map(lambda leaf: leaf.flatten(0, 1), tree(about["inputs"]["tensors"], known, "inputs"))
    samples = prepared.leaves[0].shape[0]
    changes: dict[str, Any] = {}
    for name, directions in zip(DIRECTIONS, (prepared.cotangents, prepared.tangents), strict=True):
        given = about["request"].get(name)
        if given is None:
            continue
        told = given.get("tensors") if isinstance(given, Mapping) else None
        leaf = tree(told, known, name) if told is not None else None
        # One tensor is told apart by its axes; a tree of them is left to who reads them one by one.
        if not isinstance(leaf, Tensor) or directions is None or len(directions.parts) != 1:
            return None
        changes[name] = _per_sample(leaf, samples, directions.parts[0].dim() - 2)
        if changes[name] is None:
            return None
    return Batch(inputs, first.model_copy(update=changes))


def _per_sample(given: Tensor, samples: int, axes: int) -> Tensor | None:
    """Directions of all pieces, `(pieces, ...)`, as one direction (or K of them) for every sample of the batch.

    Args:
        given: of each piece one for all its samples, one for each, or K for each.
        samples: how many every piece holds.
        axes: of one direction.
    """
    extra = given.dim() - 1 - axes
    if extra == 0:
        return given.unsqueeze(1).expand(given.shape[0], samples, *given.shape[1:]).flatten(0, 1)
    if not 1 <= extra <= 2 or given.shape[extra] != samples:
        return None
    return given.flatten(0, 1) if extra == 1 else given.movedim(0, 1).flatten(1, 2)


def answered(message: Message, plan: Plan, blocks: Mapping[str, Tensor], count: int) -> memoryview | None:
    """The answers to all pieces one after another, or None where an answer holds more than the arrays of its plan.

    Args:
        message: the answer to the first piece.
        plan: of the whole batch.
        blocks: the arrays of the whole batch by key.
        count: how many pieces of equally many samples the batch has.
    """
    if message.about["blocks"]:
        return None
    header, parts = message.encode()
    out = np.empty((count, len(header) + sum(map(len, parts))), np.uint8)
    out[:, : len(header)] = np.frombuffer(header, np.uint8)
    axes = {array.key: array.axis for array in plan.arrays}
    at = len(header)
    for name, part in zip(message.order(), parts, strict=True):
        stop = at + len(part)
        if name in axes:
            out[:, at:stop] = _rows(blocks[name], axes[name], count)
        else:  # the receipt, which speaks of the batch
            out[:, at:stop] = np.frombuffer(part, np.uint8)
        at = stop
    return out.reshape(-1).data.cast("B")


def _rows(block: Tensor, axis: int, count: int) -> Any:
    """An array's bytes by piece: `(count, bytes)`."""
    size = block.shape[axis] // count
    by_piece = block.detach().cpu().unflatten(axis, (count, size)).movedim(axis, 0)
    width = math.prod(by_piece.shape[1:]) * by_piece.element_size()
    return np.frombuffer(raw(by_piece), np.uint8).reshape(count, width)
