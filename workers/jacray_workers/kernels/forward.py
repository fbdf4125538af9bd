"""`forward`: `vmap` over samples of a Jacobian-vector product per input column, as `vmap(jacfwd(f))` does.

Columns go in chunks, so the D x D identity that `jacfwd` makes never exists at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from jacray_workers.kernels import reverse
from jacray_workers.kernels.common import (
    basis,
    begun,
    blocks_for,
    leaf_dims,
    per_sample,
    reach,
    sample_function,
    spans,
    whole,
)
from jacray_workers.problem.problem import Problem
from jacray_workers.sharing import forward_mode, math_attention

WIDTH = 256

CHUNKS_ITSELF = True

refuse = reverse.refuse
jvp = reverse.jvp


def jacobian(
    problem: Problem,
    batch: Sequence[Tensor],
    rows: range | None = None,
    into: list[Tensor] | None = None,
    width: int | None = None,
) -> list[Tensor]:
    """One block `(B, len(rows), *leaf)` per leaf.

    Args:
        problem: what to differentiate.
        batch: the placed input leaves, `(B, *in)` each.
        rows: output rows, all by default.
        into: buffers to write to.
        width: tangents in flight at a time per sample.
    """
    rows = range(problem.rows) if rows is None else rows
    values = whole(problem.values(batch))
    blocks = blocks_for(problem, batch[0].shape[0], len(rows), into)
    done, before = begun(into), 0
    for index, leaf in enumerate(problem.leaves):
        flat = blocks[index].reshape(batch[0].shape[0], len(rows), leaf.size)
        for span in spans(range(leaf.size)[max(done - before, 0) :], width or WIDTH):
            flat[:, :, span.start : span.stop] = _push(problem, values, batch, index, span)[:, rows.start : rows.stop]
            if _same_memory(flat, blocks[index]):
                reach(into, before + span.stop)
        before += leaf.size
        blocks[index].copy_(flat.reshape(blocks[index].shape)) if not _same_memory(flat, blocks[index]) else None
    return blocks


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def _push(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor], index: int, span: range) -> Tensor:
    """The columns `span` of one leaf's Jacobian: `(B, rows, len(span))`."""
    leaf = problem.leaves[index]
    value = values[index]
    tangents = basis(span, leaf.size, value).reshape(len(span), *leaf.shape)
    if problem.compared:
        return _push_unmapped(problem, values, batch, index, tangents)

    def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...]) -> Tensor:
        function = _only(sample_function(problem, sample), sample_values, index)

        def push(v: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(function, (sample_values[index],), (v,))[1]
            return found

        # Not `out_dims=1`: torch then misplaces a result that depends on no tangent.
        columns: Tensor = vmap(push, randomness="same")(tangents)
        return columns.transpose(0, 1)

    dims = (leaf_dims(problem), (0,) * len(batch))
    with forward_mode(), math_attention():
        found: Tensor = vmap(one, in_dims=dims, randomness="same")(tuple(values), tuple(batch))
    return found


def _push_unmapped(
    problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor], index: int, tangents: Tensor
) -> Tensor:
    """The same without `vmap` over samples, for a model that reads values of its masks."""
    function = _only(lambda *leaves: problem.forward(leaves, batch), values, index)
    if per_sample(problem.leaves[index]):
        tangents = tangents[:, None].expand(-1, len(batch[0]), *tangents.shape[1:])

    def push(v: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(function, (values[index],), (v,))[1]
        return found

    with forward_mode(), math_attention():
        columns: Tensor = vmap(push, randomness="same")(tangents)
    return columns.permute(1, 2, 0)


def _only(function: Callable[..., Tensor], values: Sequence[Tensor], index: int) -> Callable[[Tensor], Tensor]:
    """The function of one leaf, the others held."""

    def of_one(value: Tensor) -> Tensor:
        return function(*values[:index], value, *values[index + 1 :])

    return of_one


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """Each chunk of columns is contracted with the cotangents as it comes: the Jacobian is never held."""
    values = whole(problem.values(batch))
    k, size = cotangents.shape[:2]
    found = []
    for index, leaf in enumerate(problem.leaves):
        parts = []
        summed = not per_sample(leaf) and not per_sample_params
        for span in spans(range(leaf.size), WIDTH):
            pushed = _push(problem, values, batch, index, span)
            parts.append(torch.einsum("kbr,brc->kc" if summed else "kbr,brc->kbc", cotangents.to(pushed.dtype), pushed))
        flat = torch.cat(parts, dim=-1) if parts else cotangents.new_zeros((k, 0) if summed else (k, size, 0))
        found.append(flat.reshape(*flat.shape[:-1], *leaf.shape))
    return found
