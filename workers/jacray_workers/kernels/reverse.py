"""`reverse`: `vmap` over samples of a vector-Jacobian product per output row, as `vmap(jacrev(f))` does.

Source: the torch.func documentation of `vmap` and `jacrev`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vjp as func_vjp
from torch.func import vmap

from jacray_workers.kernels.common import (
    basis,
    blocks_for,
    leaf_dims,
    math_attention,
    per_sample,
    sample_function,
    spans,
    whole,
)
from jacray_workers.problem.problem import Problem

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
    rows = range(problem.rows) if rows is None else rows
    if not rows:
        return blocks_for(problem, batch[0].shape[0], 0, into)
    values = problem.values(batch)

    def one(sample_values: tuple[Tensor, ...], sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, pull = func_vjp(sample_function(problem, sample), *sample_values)[:2]
        parts = [vmap(pull, randomness="same")(basis(span, problem.rows, y)) for span in spans(rows, width)]
        return tuple(torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))

    mapped = vmap(one, in_dims=(leaf_dims(problem), (0,) * len(batch)), randomness="same")
    with math_attention():
        return deliver(list(mapped(tuple(values), tuple(batch))), into)


def deliver(blocks: list[Tensor], into: list[Tensor] | None) -> list[Tensor]:
    """The blocks, copied to the caller's buffers where there are some."""
    if into is None:
        return blocks
    for target, block in zip(into, blocks, strict=True):
        target.copy_(block)
    return into


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """`cotangents` `(K, B, rows)` pulled back to every leaf; see the package's docstring for the shapes."""
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
    with math_attention():
        found: Tensor = vmap(one, in_dims=dims, randomness="same")(tuple(values), tuple(batch), tuple(handed))
    return found.transpose(0, 1)
