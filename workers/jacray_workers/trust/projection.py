"""Results seen along random directions, and how large the terms are that add up to what is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacray_workers.trust.reference import Point, own

# Numbers of a block that are looked at as float64 at a time, unless one row has more.
CHUNK = 1 << 16
# A factored block of more numbers than this is not made dense for a check.
FACTORED = 1 << 25


@dataclass(frozen=True)
class Projected:
    """One block seen along u and v, each with the sum of the squares of the terms that it adds up."""

    pulled: Tensor
    pulled_square: Tensor
    pushed: Tensor
    pushed_square: Tensor


def project(block: Any, u: Tensor, v: Tensor) -> Projected:
    """Read the block once, some rows at a time, as float64; a large factored one by its own products."""
    if hasattr(block, "dense") and u.numel() * v.numel() > FACTORED:
        precise = block.double()
        pulled, pushed = precise.vjp(u.reshape(block.out_shape)).reshape(v.shape), precise.jvp(v).reshape(u.shape)
        return Projected(pulled, pulled.square(), pushed, pushed.square())
    dense = block.dense() if hasattr(block, "dense") else block
    flat = dense.reshape(u.shape[0], v.numel())
    pulled, squared = torch.zeros_like(v).flatten(), torch.zeros_like(v).flatten()
    pushed, pushed_squared = torch.zeros_like(u), torch.zeros_like(u)
    step = max(CHUNK // max(v.numel(), 1), 1)
    # One buffer for all pieces: fresh memory would cost more than the arithmetic.
    buffer = v.new_empty(min(step, u.shape[0]), v.numel())
    for start in range(0, u.shape[0], step):
        here = slice(start, min(start + step, u.shape[0]))
        rows = buffer[: here.stop - start].copy_(flat[here])
        pulled += u[here] @ rows
        pushed[here] = rows @ v.flatten()
        rows.mul_(rows)
        squared += u[here].square() @ rows
        pushed_squared[here] = rows @ v.flatten().square()
    return Projected(pulled.view_as(v), squared.view_as(v), pushed, pushed_squared)


def summed(point: Point, cotangents: Tensor) -> list[Tensor]:
    """Cotangents `(B, rows)` pulled back one sample at a time: summed for parameters, stacked for other leaves."""
    parts = [
        replace(point, batch=tuple(leaf[i : i + 1] for leaf in point.batch), position=0).pull(k)
        for i, k in enumerate(cotangents)
    ]
    return [
        torch.stack(grads) if own(leaf) else torch.stack(grads).double().sum(0)
        for leaf, grads in zip(point.problem.leaves, zip(*parts, strict=True), strict=True)
    ]


def mixed(tensors: Any, mix: Tensor) -> Tensor:
    """The combination of K tensors."""
    return torch.einsum("k,k...->...", mix, tensors.to(mix))


def mixed_size(tensors: Any, mix: Tensor) -> Tensor:
    """The root of the summed squares of the terms of that combination."""
    return torch.einsum("k,k...->...", mix.square(), tensors.to(mix).square()).sqrt()


def rms(value: Tensor) -> float:
    """The root mean square, added up in float64."""
    length = float(torch.linalg.vector_norm(value, dtype=torch.float64))
    return length / math.sqrt(max(value.numel(), 1))


def size_of(value: Tensor) -> float:
    """The root mean square of a leaf's values, 1 for one that is zero."""
    found = rms(value)
    return found if 0 < found < float("inf") else 1.0
