"""`reverse`: `vmap` over samples of a vector-Jacobian product per output row, as `vmap(jacrev(f))` does.

A model that reads values of its masks cannot run under `vmap`. Where whole batches were seen to be safe it runs as it
is, once for the batch, and `vmap` goes over the cotangents alone; for parameters, once for every sample.

Source: the torch.func documentation of `vmap` and `jacrev`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vjp as func_vjp
from torch.func import vmap

from jacray_workers.kernels.common import (
    basis,
    begun,
    blocks_for,
    leaf_dims,
    per_sample,
    reach,
    sample_function,
    singly,
    spans,
    varied,
    whole,
)
from jacray_workers.problem.problem import Problem
from jacray_workers.sharing import forward_mode, math_attention

CHUNKS_ITSELF = True


def refuse(problem: Problem) -> str:
    """No shape alone defeats it."""
    del problem
    return ""


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
        width: cotangents in flight at a time per sample.
    """
    rows, done = range(problem.rows) if rows is None else rows, begun(into)
    if not rows:
        return blocks_for(problem, batch[0].shape[0], 0, into)
    values = tuple(problem.values(batch))
    if into is None and (width or len(rows)) >= len(rows):
        return _band(problem, values, batch, rows)
    blocks = blocks_for(problem, batch[0].shape[0], len(rows), into)
    # One pass forward per band costs little beside its rows, and no band is held beside the next.
    for span in spans(rows[done:], width):
        place = slice(span.start - rows.start, span.stop - rows.start)
        deliver(_band(problem, values, batch, span), [block[:, place] for block in blocks])
        reach(into, place.stop)
    return blocks


def deliver(blocks: list[Tensor], into: list[Tensor]) -> None:
    """Copy blocks to where they belong, and let go of each."""
    for target in into:
        target.copy_(blocks.pop(0))


def _band(problem: Problem, values: tuple[Tensor, ...], batch: Sequence[Tensor], rows: range) -> list[Tensor]:
    if problem.compared:
        return _unmapped(problem, batch, lambda v, b: _pull_rows(problem, v, b, rows))

    def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, pull = func_vjp(sample_function(problem, sample), *sample_values)[:2]
        found: tuple[Tensor, ...] = vmap(pull, randomness="same")(basis(rows, problem.rows, y))
        return found

    mapped = vmap(one, in_dims=(leaf_dims(problem), (0,) * len(batch)), randomness="same")
    with math_attention():
        return list(mapped(values, tuple(batch)))


def _unmapped(
    problem: Problem, batch: Sequence[Tensor], work: Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """What `work(values, batch)` gives for the batch at once; with parameters, sample by sample."""
    with math_attention():
        if all(per_sample(leaf) for leaf in problem.leaves):
            return work(problem.values(batch), batch)
        parts = [work(problem.values(sample), sample) for sample in singly(batch)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _pull_rows(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor], rows: range) -> list[Tensor]:
    """The blocks `(B, len(rows), *leaf)`; `(1, len(rows), *param)`, of the one sample."""
    y, pull = func_vjp(lambda *leaves: problem.forward(leaves, batch), *values)[:2]
    found = vmap(pull, randomness="same")(basis(rows, problem.rows, y)[:, None].expand(-1, len(y), -1))
    pairs = zip(found, problem.leaves, strict=True)
    return [grad.transpose(0, 1) if per_sample(leaf) else grad[None] for grad, leaf in pairs]


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """`cotangents` `(K, B, rows)` pulled back to every leaf; see the package's docstring for the shapes."""
    if problem.compared:
        return _vjp_unmapped(problem, batch, cotangents, per_sample_params)
    values = problem.values(batch)
    if not per_sample_params or all(per_sample(leaf) for leaf in problem.leaves):
        return _vjp_of_batch(problem, values, batch, cotangents)

    def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...], ks: Tensor) -> tuple[Tensor, ...]:
        pull = func_vjp(sample_function(problem, sample), *sample_values)[1]
        found: tuple[Tensor, ...] = vmap(pull, randomness="same")(ks)
        return found

    dims = (leaf_dims(problem), (0,) * len(batch), 1)
    with math_attention():
        found = vmap(one, in_dims=dims, randomness="same")(tuple(values), tuple(batch), cotangents)
    # Not `out_dims=1`: torch then misplaces a result that depends on no sample.
    return [grad.transpose(0, 1) for grad in found]


def _vjp_unmapped(
    problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool
) -> list[Tensor]:
    """The same without `vmap` over samples."""
    if per_sample_params and len(batch[0]) > 1 and not all(per_sample(leaf) for leaf in problem.leaves):
        parts = [vjp(problem, sample, cotangents[:, i : i + 1]) for i, sample in enumerate(singly(batch))]
        return [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
    with math_attention():
        pull = func_vjp(lambda *leaves: problem.forward(leaves, batch), *problem.values(batch))[1]
        found = vmap(pull, randomness="same")(cotangents)
    pairs = zip(found, problem.leaves, strict=True)
    return [grad[:, None] if per_sample_params and not per_sample(leaf) else grad for grad, leaf in pairs]


def _vjp_of_batch(problem: Problem, values: list[Tensor], batch: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """One pull-back of the whole batch: parameters are shared by the samples, so their gradients come summed."""

    def rows_of(*leaves: Tensor) -> Tensor:
        def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...]) -> Tensor:
            return sample_function(problem, sample)(*sample_values)

        mapped = vmap(one, in_dims=(leaf_dims(problem), (0,) * len(batch)), randomness="same")
        found: Tensor = mapped(tuple(leaves), tuple(batch))
        return found

    with math_attention():
        pull = func_vjp(rows_of, *values)[1]
    return [torch.stack(parts) for parts in zip(*[pull(k) for k in cotangents], strict=True)]


def jvp(problem: Problem, batch: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """`tangents`, one `(K, B, *leaf)` per leaf, pushed forward: `(K, B, rows)`.

    One tangent for all samples of a parameter, expanded over B, is used as one: its product is then one matrix product.
    """
    if problem.compared:
        return _jvp_unmapped(problem, batch, tangents)
    values = whole(problem.values(batch))
    shared = [not per_sample(leaf) and v.stride(1) == 0 for leaf, v in zip(problem.leaves, tangents, strict=True)]
    handed = [v[:, 0] if alike else v for v, alike in zip(tangents, shared, strict=True)]

    def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> Tensor:
        function = sample_function(problem, sample)

        def push(*v: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(function, sample_values, v)[1]
            return found

        pushed: Tensor = vmap(push, randomness="same")(*vs)
        return pushed

    dims = (leaf_dims(problem), (0,) * len(batch), tuple(None if alike else 1 for alike in shared))
    with forward_mode(), math_attention():
        found: Tensor = vmap(one, in_dims=dims, randomness="same")(tuple(values), tuple(batch), tuple(handed))
    return found.transpose(0, 1)


def _jvp_unmapped(problem: Problem, batch: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The same without `vmap` over samples."""
    if varied(problem, tangents) and len(batch[0]) > 1:
        pairs = zip(singly(batch), singly(tangents, 1), strict=True)
        return torch.cat([jvp(problem, sample, own) for sample, own in pairs], dim=1)
    values = tuple(whole(problem.values(batch)))
    handed = [v if per_sample(leaf) else v[:, 0] for leaf, v in zip(problem.leaves, tangents, strict=True)]

    def push(*v: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda *leaves: problem.forward(leaves, batch), values, v)[1]
        return found

    with forward_mode(), math_attention():
        pushed: Tensor = vmap(push, randomness="same")(*handed)
    return pushed
