"""Put terms together: of several samples, of several bands of rows, of several uses of one parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers.blocks.terms import Dense, Lookup, Outer, Term


def cat_terms(terms: Sequence[Term], axis: int) -> Term:
    """One term from the same term of several samples (axis 0) or of several bands of rows (axis 1)."""
    first = terms[0]
    if len(terms) == 1:
        return first
    if isinstance(first, Outer) and any(t.g is None for t in terms if isinstance(t, Outer)):
        return _cat_eyes([t for t in terms if isinstance(t, Outer)], axis)
    shared = {"a", "x", "index"} if axis == 1 else set[str]()
    parts = {
        name: part if name in shared else torch.cat(_level([t.tensors()[name] for t in terms], name), dim=axis)
        for name, part in first.tensors().items()
    }
    return first.with_parts(parts)


def _cat_eyes(terms: Sequence[Outer], axis: int) -> Term:
    """Rows of the identity stay so where they follow each other."""
    first = terms[0]
    if axis == 0 and all((t.start, t.count, t.g) == (first.start, first.count, None) for t in terms):
        return dataclasses.replace(first, a=torch.cat([t.a for t in terms]))
    ends = [t.start + t.count for t in terms]
    if axis == 1 and all(t.g is None for t in terms) and ends[:-1] == [t.start for t in terms[1:]]:
        return dataclasses.replace(first, count=sum(t.count for t in terms))
    return cat_terms([dataclasses.replace(t, g=t.explicit_g(), start=0, count=0) for t in terms], axis)


def _level(parts: list[Tensor], name: str) -> list[Tensor]:
    """Parts of shards may hold different numbers of positions: the missing ones contribute nothing."""
    axis = {"a": 1, "index": 1, "g": 2}.get(name)
    if axis is None or len({p.shape[axis] for p in parts}) == 1:
        return parts
    most = max(p.shape[axis] for p in parts)
    return [torch.cat([p, p.new_zeros(_resized(p.shape, axis, most - p.shape[axis]))], dim=axis) for p in parts]


def _resized(shape: torch.Size, axis: int, size: int) -> list[int]:
    return [size if i == axis else n for i, n in enumerate(shape)]


def cat_positions(terms: Sequence[Term]) -> Term:
    """One term from several of one kind: the positions of all, side by side."""
    axes = {"a": 1, "index": 1, "g": 2}
    parts = {name: torch.cat([t.tensors()[name] for t in terms], dim=axes[name]) for name in terms[0].tensors()}
    return terms[0].with_parts(parts)


def cast(term: Term, dtype: torch.dtype) -> Term:
    """The term with every floating-point part in one precision: activations and cotangents may differ in theirs."""
    if all(part.dtype == dtype for part in term.cast_parts()):
        return term
    return term.map(lambda part: part.to(dtype) if part.is_floating_point() else part)


def trimmed(term: Term) -> Term:
    """The term without the positions where no cotangent arrived, as all but one of them where a model reads one token.

    Looking costs one pass over the cotangents; the product that it may save costs as many as there are input features.
    """
    if (
        not isinstance(term, Outer)
        or term.g is None
        or not term.g.numel()
        or term.a.shape[1] < 8
        or term.a.shape[2] < 16
    ):
        return term
    if _some_left(term.g[0, 0]):
        return term
    # Zero times NaN is NaN, as in plain autograd: nothing is left out that is not a number, on either side.
    if not bool(term.a.sum().isfinite()):
        return term
    used = (term.g.detach().abs().amax(dim=(0, 1, 3)) != 0).nonzero().flatten()
    if 4 * len(used) > 3 * term.a.shape[1]:
        return term
    used = used if len(used) else used.new_zeros(1)
    return dataclasses.replace(term, a=term.a[:, used], g=term.g[:, :, used])


def _some_left(g: Tensor) -> bool:
    """Whether most positions of `(S, O)` get something: then so they do for all rows and samples together."""
    return 4 * int((g.detach() != 0).any(dim=1).sum()) > 3 * g.shape[0]


def join(terms: Sequence[Term]) -> list[Term]:
    """Terms of one kind as one: outer products and lookups side by side as more positions, dense ones added up."""
    groups: dict[Any, list[Term]] = {}
    for term in terms:
        groups.setdefault(_kind(term), []).append(term)
    return [trimmed(_joined(group)) for group in groups.values()]


def _kind(term: Term) -> Any:
    same = type(term), term.own, term.view
    if isinstance(term, Outer):
        return (*same, term.flip) if term.g is not None else id(term)
    return same if isinstance(term, Dense | Lookup) else id(term)


def _joined(group: list[Term]) -> Term:
    if len(group) == 1:
        return group[0]
    first = group[0]
    if isinstance(first, Dense):
        blocks = [term.block for term in group if isinstance(term, Dense)]
        total = blocks[0] + blocks[1]
        for block in blocks[2:]:
            total += block
        return dataclasses.replace(first, block=total)
    return cat_positions(group)
