"""Inner products of factored blocks over the parameter, without making either block dense where that is cheaper.

For two terms J = sum_s g_s x a_s and J' = sum_t g'_t x a'_t the product over the parameter is
sum_{s,t} (a_s . a'_t) (g_s . g'_t): the structure behind fast empirical tangent kernels.

Source: Novak, Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from jacray_workers.blocks.terms import Conv, Dense, Lookup, Outer, Term, View

# How many numbers an intermediate of these products may hold before it is cut into pieces.
LIMIT = 1 << 25


def gram(t: Term, u: Term, shape: tuple[int, ...]) -> Tensor:
    """The product over the parameter of every row with every row: `(B, R, B', R')`.

    Args:
        t: a term of a block.
        u: a term of another block for the same parameter.
        shape: the parameter's shape.
    """
    if t.view != u.view:
        if _apart(t.view, u.view):
            return _parts(t)[0].new_zeros(*t.size, *u.size)
        return _dense_gram(_whole(t, shape), _whole(u, shape))
    if isinstance(t, Lookup) and isinstance(u, Lookup):
        return _pair_gram(partial(_matches, t.index, u.index, t.g.dtype), t.g.unsqueeze(2), u.g.unsqueeze(2))
    if isinstance(t, Lookup) and isinstance(u, Outer) and not u.flip:
        return _tied_gram(t, u)
    if isinstance(u, Lookup) and isinstance(t, Outer) and not t.flip:
        return _tied_gram(u, t).permute(2, 3, 0, 1)
    if isinstance(t, Outer) and isinstance(u, Outer) and t.g is None and u.g is None:
        return _eye_gram(t, u)
    if isinstance(t, Outer | Conv) and isinstance(u, Outer | Conv):
        return _outer_gram(t, u)
    return _dense_gram(t, u)


def _parts(t: Term) -> list[Tensor]:
    return t.cast_parts()


def _outer_gram(t: Outer | Conv, u: Outer | Conv) -> Tensor:
    a, b, g, h = t.acts(), u.acts(), t.cots(), u.cots()
    if t.flip != u.flip or a.shape[1] != b.shape[1] or a.shape[3] != b.shape[3]:
        return _dense_gram(t, u)
    if a.shape[1] * a.shape[2] == 1 and b.shape[2] == 1:
        products = g.flatten(0, 1).flatten(1) @ h.flatten(0, 1).flatten(1).mT
        return products.reshape(*t.size, *u.size) * (a[:, 0, 0] @ b[:, 0, 0].mT)[:, None, :, None]
    if _dense_cost(a, g, h) < _pair_cost(a, b, g, h):
        return _dense_gram(t, u)
    return _pair_gram(lambda some: torch.einsum("bgsi,cgti->gbsct", a, b[some]), g, h)


def _dense_cost(a: Tensor, g: Tensor, h: Tensor) -> float:
    """Multiplications of making both blocks dense and multiplying them."""
    weight = g.shape[2] * g.shape[4] * a.shape[3]
    rows, others = g.shape[0] * g.shape[1], h.shape[0] * h.shape[1]
    return float(weight) * (rows * g.shape[3] + others * h.shape[3] + rows * others)


def _pair_cost(a: Tensor, b: Tensor, g: Tensor, h: Tensor) -> float:
    """Multiplications of going through pairs of positions."""
    left, right = g.shape[0] * g.shape[3], h.shape[0] * h.shape[3]
    rows = g.shape[0] * g.shape[1] * h.shape[0] * h.shape[1]
    width = g.shape[2] * g.shape[4]
    return float(a.shape[1]) * left * right * b.shape[3] + width * (left * right * h.shape[1] + rows * g.shape[3])


def _pair_gram(weights: Callable[[slice], Tensor], g: Tensor, h: Tensor) -> Tensor:
    """The sum over pairs of positions of `weights` times the products of cotangents: `(B, R, B', R')`.

    Args:
        weights: for some samples of the second block, `(G, B, S, B', S')`.
        g: `(B, R, G, S, O)`.
        h: `(B', R', G, S', O)`.
    """
    batch, rows, groups, places, width = g.shape
    others, more = h.shape[:2]
    found = g.new_empty(batch, rows, others, more)
    step = max(1, LIMIT // max(1, groups * batch * places * max(more * width, h.shape[3])))
    flat = g.flatten(2)
    for low in range(0, others, step):
        some = slice(low, min(low + step, others))
        right = h[some].permute(2, 0, 3, 1, 4).flatten(3)
        left = weights(some).permute(0, 3, 1, 2, 4).flatten(2, 3)
        carried = (left.to(right.dtype) @ right).unflatten(2, (batch, places)).unflatten(4, (more, width))
        # (G, b', B, S, R', O) to (B, G S O, b' R')
        columns = carried.permute(2, 0, 3, 5, 1, 4).flatten(1, 3).flatten(2)
        found[:, :, some] = (flat @ columns).unflatten(2, (-1, more))
    return found


def _matches(here: Tensor, there: Tensor, dtype: torch.dtype, some: slice) -> Tensor:
    """1 where two positions looked up the same row: `(1, B, S, B', S')`."""
    return (here[:, :, None, None] == there[some]).unsqueeze(0).to(dtype)


def _tied_gram(t: Lookup, u: Outer) -> Tensor:
    """A table that is also a linear layer's weight, as the embeddings and the head of a language model."""
    cots = u.explicit_g()
    found = t.g.new_empty(*t.size, *u.size)
    flat = t.g.flatten(0, 2) @ u.a.flatten(0, 1).mT
    products = flat.view(*t.g.shape[:3], *u.a.shape[:2])
    for i, index in enumerate(t.index):
        chosen = cots[..., index]
        found[i] = torch.einsum("rsct,cvts->rcv", products[i], chosen)
    return found


def _eye_gram(t: Outer, u: Outer) -> Tensor:
    rows = torch.arange(t.start, t.start + t.count, device=t.a.device)
    others = torch.arange(u.start, u.start + u.count, device=t.a.device)
    same = (rows[:, None] == others).to(t.a.dtype)
    return (t.a[:, 0] @ u.a[:, 0].mT)[:, None, :, None] * same[:, None, :]


def _dense_gram(t: Term, u: Term) -> Tensor:
    """Both made dense, a few samples at a time."""
    found = _parts(t)[0].new_empty(*t.size, *u.size)
    for here, left in _bands(t):
        for there, right in _bands(u):
            products = left.flatten(0, 1) @ right.flatten(0, 1).mT
            found[here, :, there] = products.view(*left.shape[:2], *right.shape[:2])
    return found


def _bands(t: Term) -> Iterator[tuple[slice, Tensor]]:
    batch, rows = t.size
    step = max(1, LIMIT // max(1, rows * math.prod(t.own)))
    for low in range(0, batch, step):
        part = slice(low, min(low + step, batch))
        yield part, t.pick(part, slice(None)).dense().flatten(2)


def _whole(t: Term, shape: tuple[int, ...]) -> Term:
    """The term as a dense one over the whole parameter."""
    return t if t.view is None else Dense(shape, None, whole_dense(t, shape))


def whole_dense(t: Term, shape: tuple[int, ...]) -> Tensor:
    """The dense term over the whole parameter, `(B, R, *shape)`."""
    out = _parts(t)[0].new_zeros(*t.size, *shape)
    t.write(seen_through(out, t.view, 2), add=False)
    return out


def seen_through(out: Tensor, view: View | None, lead: int) -> Tensor:
    """The part of `out`, whose last axes are a contiguous parameter's, that a view of that parameter shows."""
    if view is None:
        return out
    size, stride, offset = view
    return out.as_strided((*out.shape[:lead], *size), (*out.stride()[:lead], *stride), out.storage_offset() + offset)


def _apart(v: View | None, w: View | None) -> bool:
    """Whether two views share no number, judged by the memory between their ends."""
    if v is None or w is None:
        return False
    ends = [sum((n - 1) * s for n, s in zip(x.size, x.stride, strict=True)) + x.offset for x in (v, w)]
    return ends[0] < w.offset or ends[1] < v.offset


def inner(t: Term, u: Term, shape: tuple[int, ...]) -> Tensor:
    """Per sample, the sum over rows of the products of equal rows: `(B,)`."""
    if t.view != u.view:
        if _apart(t.view, u.view):
            return _parts(t)[0].new_zeros(t.size[0])
        return inner(_whole(t, shape), _whole(u, shape), shape)
    if isinstance(t, Outer | Conv) and isinstance(u, Outer | Conv) and t.flip == u.flip and t.own == u.own:
        a, b, g, h = t.acts(), u.acts(), t.cots(), u.cots()
        if a.shape[1] == b.shape[1] and b.shape[2] <= b.shape[3]:
            carried = (a @ b.mT).unsqueeze(1) @ h
            return (g * carried).flatten(1).sum(dim=1)
    if isinstance(t, Lookup) and isinstance(u, Lookup):
        same = (t.index[:, :, None] == u.index[:, None, :]).to(t.g.dtype)
        return (t.g * (same.unsqueeze(1) @ u.g)).flatten(1).sum(dim=1)
    return _dense_inner(t, u)


def _dense_inner(t: Term, u: Term) -> Tensor:
    batch, rows = t.size
    step = max(1, LIMIT // max(1, rows * math.prod(t.own)))
    parts = []
    for low in range(0, batch, step):
        part = slice(low, low + step)
        left, right = (x.pick(part, slice(None)).dense().flatten(1) for x in (t, u))
        parts.append((left * right).sum(dim=1))
    return torch.cat(parts) if parts else _parts(t)[0].new_zeros(0)
