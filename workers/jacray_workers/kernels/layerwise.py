"""`layerwise`: cotangents are pulled back to activations only; each parameter's block is a product made on the spot.

One forward pass of the whole batch, one batched backward pass for all rows at once, and for each use of a parameter the
product of what went in and the cotangent of what came out: `vmap(jacrev)` computes the same numbers but builds each
sample's parameter gradient on the way. Blocks can stay factored.

Sources: Goodfellow, "Efficient per-example gradient computations" (2015); Rochette, Manoel and Tramel, "Efficient
per-example gradient computations in convolutional neural networks" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.blocks.block import Block, DenseBlock, dense_block, smaller, write_terms
from jacray_workers.blocks.join import cast, cat_terms
from jacray_workers.blocks.terms import Dense, Term
from jacray_workers.errors import MethodError
from jacray_workers.kernels.common import begun, blocks_for, note_bound, per_sample, reach, spans
from jacray_workers.kernels.pullback import Point, pull
from jacray_workers.problem.problem import Leaf, Problem
from jacray_workers.taps.record import Pulled, Tape, pull_cotangents, pull_rows, record

CHUNKS_ITSELF = True
# Cotangents in flight where the widest tensor's would otherwise leave the cache, and how few are never parted.
CACHE_BYTES, SEVERAL = 15 << 19, 16
Form = Literal["dense", "auto", "factors"]


def refuse(problem: Problem) -> str:
    """Random models and compiled ones are refused; the rest shows in the running."""
    if problem.random:
        return "the model draws random numbers, which differ between a batch and its samples"
    if any(isinstance(m, torch.jit.ScriptModule) for m in problem.module.modules()):
        return "the calls of a scripted module cannot be seen"
    return ""


def jacobian(
    problem: Problem,
    batch: Sequence[Tensor],
    rows: range | None = None,
    into: list[Tensor] | None = None,
    width: int | None = None,
    form: Form = "dense",
) -> list[Tensor]:
    """One block `(B, len(rows), *leaf)` per leaf.

    Args:
        problem: what to differentiate.
        batch: the placed input leaves, `(B, *in)` each.
        rows: output rows, all by default.
        into: buffers to write to; makes every block dense.
        width: rows in flight at a time.
        form: `dense` returns plain tensors; with `factors` parameters' blocks are `Block`s, factored wherever
            there are factors; with `auto` wherever these are smaller.
    """
    rows = range(problem.rows) if rows is None else rows
    if not rows:
        return blocks_for(problem, batch[0].shape[0], 0, into)
    tape = record(problem, batch)
    width = min(width or len(rows), max(SEVERAL, CACHE_BYTES // max(tape.widest, 1)))
    if into is None and form == "dense" and all(per_sample(leaf) for leaf in problem.leaves):
        return _factored(tape, rows, width, form)
    if into is not None or form == "dense":
        return _dense(tape, rows, blocks_for(problem, tape.size, len(rows), into), width)
    return _factored(tape, rows, width, form)


def _dense(tape: Tape, rows: range, into: list[Tensor], width: int | None) -> list[Tensor]:
    done = begun(into)
    # Of what an earlier attempt has left no bound is known.
    bounds = [math.nan if done else 0.0] * len(into)
    for span in spans(rows[done:], width):
        place = slice(span.start - rows.start, span.stop - rows.start)
        _write(tape, span, [target[:, place] for target in into], bounds)
        reach(into, place.stop)
    for i, bound in enumerate(bounds):
        note_bound(into, i, bound)
    return into


def _write(tape: Tape, rows: range, into: list[Tensor], bounds: list[float]) -> None:
    """Some rows; nothing of them is held when the next are made."""
    pulled = pull_rows(tape, rows)
    for i, (target, grad, terms) in enumerate(zip(into, pulled.grads, pulled.terms, strict=True)):
        if grad is None:
            write_terms(terms, target)
            bounds[i] += sum(term.bound() for term in terms)
        else:
            target.copy_(grad.transpose(0, 1))
            bounds[i] = math.nan


def _factored(tape: Tape, rows: range, width: int | None, form: Form) -> list[Tensor]:
    bands = [pull_rows(tape, span) for span in spans(rows, width)]
    found: list[Tensor] = []
    for i, leaf in enumerate(tape.problem.leaves):
        grads = [band.grads[i] for band in bands]
        if leaf.side != "param":
            bands_of_leaf = [g for g in grads if g is not None]
            found.append((bands_of_leaf[0] if len(bands) == 1 else torch.cat(bands_of_leaf)).transpose(0, 1))
        else:
            dtype = torch.promote_types(leaf.dtype, tape.problem.dtype)
            terms = [cast(term, dtype) for term in _all_rows([band.terms[i] for band in bands])]
            found.append(_block(tape, leaf, terms, len(rows), form))
    return found


def _all_rows(bands: Sequence[list[Term]]) -> list[Term]:
    """The terms of all rows from those of bands of rows."""
    return [cat_terms(parts, axis=1) for parts in zip(*bands, strict=True)]


def _block(tape: Tape, leaf: Leaf, terms: list[Term], rows: int, form: Form) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, tape.problem.dtype)
    size = (tape.size, rows, *leaf.shape)
    if form == "factors" or smaller(terms, size, dtype.itemsize):
        if [type(t) for t in terms] != [Dense]:
            return Block(terms, (rows,), leaf.shape, dtype, samples=tape.size, device=tape.problem.device)
        return DenseBlock(terms, (rows,), leaf.shape, dtype)
    out = pages.empty(size, dtype, tape.problem.device)
    write_terms(terms, out)
    return dense_block(out, (rows,), leaf.shape)


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """`cotangents` `(K, B, rows)` pulled back to every leaf; see the package's docstring for the shapes."""
    if not per_sample_params and not all(per_sample(leaf) for leaf in problem.leaves):
        return _summed(problem, batch, cotangents)
    tape = record(problem, batch)
    pulled: Pulled = pull_cotangents(tape, cotangents)
    return [
        _per_sample(tape, leaf, terms, len(cotangents)) if grad is None else grad
        for leaf, grad, terms in zip(problem.leaves, pulled.grads, pulled.terms, strict=True)
    ]


def _per_sample(tape: Tape, leaf: Leaf, terms: Sequence[Term], count: int) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, tape.problem.dtype)
    out = torch.empty(count, tape.size, *leaf.shape, dtype=dtype, device=tape.problem.device)
    write_terms(terms, out.transpose(0, 1))
    return out


def _summed(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Gradients summed over the batch are what plain backward gives: no tap is needed."""
    values = [v.detach().requires_grad_() for v in problem.values(batch)]
    handed = [v.clone() if per_sample(leaf) else v for leaf, v in zip(problem.leaves, values, strict=True)]
    y = problem.forward(handed, batch)
    points = [Point.of(v) for v in values]
    if not y.requires_grad:
        return [p.zeros(len(cotangents)) for p in points]
    parts = [pull(y, points, k.unsqueeze(0)) for k in cotangents.to(y.dtype)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def jvp(problem: Problem, batch: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Not a method for pushing tangents forward.

    Raises:
        MethodError: always.
    """
    del problem, batch, tangents
    raise MethodError("method", "pulls cotangents back and has no jvp", "layerwise", "use method='forward'")
