"""Whether a side's answer is right. Asked before anything is timed; a side that is wrong is not timed.

Ours is compared with plain autograd in float64: single entries at the first and the last sample, and every entry at
once through a product with random cotangents. Peers are compared with ours, entry by entry.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.task import Arrays, Task

# Of the largest entry of an array. Float32 rounds to 6e-8 and the deepest net here has some twenty products in a row.
TOLERANCE = 1e-4
ROWS = 24  # output numbers per sample whose gradients are made one by one
SLAB = 1 << 25  # numbers compared at a time
WHOLE = 1 << 29  # arrays of more numbers than this are compared on a stretch of their rows


class WrongError(Exception):
    """An answer that disagrees with the reference; the text says where and by how much."""


def against_float64(found: Arrays, task: Task, tolerance: float = TOLERANCE) -> float:
    """The largest error of our answer relative to the largest entry.

    Raises:
        WrongError: a shape, an entry or a product is off.
    """
    same_layout(found, task)
    x = task.x.cpu()
    twin = Task(task.case, _double(task.model), x.double() if x.is_floating_point() else x)
    worst = _pairs(found, twin) if task.case.returns == "ntk" else max(_entries(found, twin), _product(found, twin))
    if not worst <= tolerance:
        raise WrongError(f"off by {worst:.1e} of the largest entry from float64")
    return worst


def against(found: Arrays, ours: Arrays, task: Task, tolerance: float = TOLERANCE) -> float:
    """The largest difference between a peer's answer and ours relative to the largest entry.

    Raises:
        WrongError: a shape or an entry is off.
    """
    same_layout(found, task)
    worst = max(_difference(found[name], ours[name]) for name in task.layout())
    if not worst <= tolerance:
        raise WrongError(f"differs by {worst:.1e} of the largest entry")
    return worst


def same_layout(found: Arrays, task: Task) -> None:
    """Refuse an answer with a missing array or another shape.

    Raises:
        WrongError: naming the shapes.
    """
    for name, shape in task.layout().items():
        if name not in found or tuple(found[name].shape) != shape:
            got = tuple(found[name].shape) if name in found else None
            raise WrongError(f"{name or 'the answer'} has shape {got} where {shape} is asked for")


def _double(model: Any) -> Any:
    twin = copy.deepcopy(model).cpu().double()
    twin.requires_grad_(True)
    return twin


def _plain(t: Tensor) -> Tensor:
    """A tensor of numbers, made dense where it was kept in factors, in main memory."""
    dense = getattr(t, "dense", None)
    return (dense() if dense is not None else t).detach().cpu()


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest entry of `b`, a stretch at a time along the second axis."""
    scale, worst = 0.0, 0.0
    rows = a.shape[1] if a.dim() > 1 else 1
    step = max(1, SLAB * rows // max(a.numel(), 1))
    for start in range(0, rows, step):
        if a.dim() > 1:
            one, other = _plain(a[:, start : start + step]), _plain(b[:, start : start + step])
        else:
            one, other = _plain(a), _plain(b)
        if not bool(torch.isfinite(one).all()):
            return math.inf
        worst = max(worst, float((one - other).abs().max()))
        scale = max(scale, float(other.abs().max()))
        if a.numel() > WHOLE and start * (a.numel() // rows) > WHOLE // 8:
            break
    return worst / scale if scale else worst


def _reference_rows(twin: Task, sample: int, rows: list[int]) -> list[dict[str, Tensor]]:
    """Gradients of single outputs at one sample, in float64, by plain autograd."""
    with torch.enable_grad():
        if twin.by_parameters:
            leaves = list(twin.parameters().values())
            y = twin.model(twin.x[sample : sample + 1]).flatten()
        else:
            leaves = [twin.point[sample : sample + 1].clone().requires_grad_(True)]
            y = twin.tail(leaves[0]).flatten()
        names = twin.names or ("",)
        grads = [torch.autograd.grad(y[r], leaves, retain_graph=True, allow_unused=True) for r in rows]
    own = [leaf if twin.by_parameters else leaf[0] for leaf in leaves]
    return [
        {n: torch.zeros_like(p) if g is None else g.reshape(p.shape) for n, g, p in zip(names, gs, own, strict=True)}
        for gs in grads
    ]


def _chosen_rows(total: int) -> list[int]:
    """The first and the last output and some between, the same on every run."""
    if total <= ROWS:
        return list(range(total))
    generator = torch.Generator().manual_seed(0)
    middle = torch.randperm(total - 2, generator=generator)[: ROWS - 2] + 1
    return sorted({0, total - 1, *middle.tolist()})


def _entries(found: Arrays, twin: Task) -> float:
    """The error of single gradients at the first and the last sample."""
    total = math.prod(twin.out_shape)
    rows, worst = _chosen_rows(total), 0.0
    for sample in {0, twin.x.shape[0] - 1}:
        for row, expected in zip(rows, _reference_rows(twin, sample, rows), strict=True):
            for name, want in expected.items():
                got = _plain(_row(found[name], sample, row, twin.out_shape)).double()
                worst = max(worst, float((got - want).abs().max()) / _scale(expected, want))
    return worst


def _row(block: Tensor, sample: int, row: int, out_shape: tuple[int, ...]) -> Tensor:
    index = [sample]
    for n in reversed(out_shape):
        index.insert(1, row % n)
        row //= n
    for i in index:
        block = block[i]
    return block


def _scale(expected: dict[str, Tensor], want: Tensor) -> float:
    """The array's own largest entry, unless it is nothing but rounding noise beside the others."""
    largest = max(float(e.abs().max()) for e in expected.values())
    return max(float(want.abs().max()), 1e-2 * largest) or 1.0


def _product(found: Arrays, twin: Task) -> float:
    """The error of sum_i k_i^T J_i over all entries, with k random, as `backward(gradient=k)` gives it."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(twin.x.shape[0], *twin.out_shape, generator=generator, dtype=torch.float64)
    with torch.enable_grad():
        if twin.by_parameters:
            leaves = list(twin.parameters().values())
            y = twin.model(twin.x)
        else:
            leaves = [twin.point.clone().requires_grad_(True)]
            y = twin.tail(leaves[0])
        wanted = torch.autograd.grad(y, leaves, k, allow_unused=True)
    names = twin.names or ("",)
    full = {n: torch.zeros_like(p) if g is None else g for n, g, p in zip(names, wanted, leaves, strict=True)}
    worst = 0.0
    for name, want in full.items():
        got = _contract(found[name], k, summed=twin.by_parameters)
        worst = max(worst, float((got - want).abs().max()) / _scale(full, want))
    return worst


def _contract(block: Tensor, k: Tensor, *, summed: bool) -> Tensor:
    """`k^T J` in float64, sample by sample, a stretch of outputs at a time; summed over samples where asked."""
    flat = k.reshape(k.shape[0], -1)
    tail = block.shape[k.dim() :]
    columns = math.prod(tail)
    step = max(1, SLAB // max(columns * math.prod(k.shape[2:]), 1))
    per_sample = torch.zeros(k.shape[0], columns, dtype=torch.float64)
    for i in range(k.shape[0]):
        for start in range(0, k.shape[1] if k.dim() > 1 else 1, step):
            part = block[i : i + 1, start : start + step] if k.dim() > 1 else block[i : i + 1]
            J = _plain(part).double().reshape(-1, columns)
            width = math.prod(k.shape[2:])
            per_sample[i] += flat[i, start * width : start * width + J.shape[0]] @ J
    total = per_sample.sum(0) if summed else per_sample
    return total.reshape(tail) if summed else total.reshape(k.shape[0], *tail)


def _pairs(found: Arrays, twin: Task) -> float:
    """The error of the tangent kernel between the first and the last sample, from float64 Jacobians of the two."""
    last = twin.x.shape[0] - 1
    rows = _chosen_rows(math.prod(twin.out_shape))
    flat = [
        torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in _reference_rows(twin, i, rows)])
        for i in (0, last)
    ]
    worst = 0.0
    for a, i in enumerate((0, last)):
        for b, j in enumerate((0, last)):
            want = flat[a] @ flat[b].T
            got = found["ntk"][i, j].detach().cpu().double()[rows][:, rows]
            worst = max(worst, float((got - want).abs().max()) / float(want.abs().max()))
    return worst
