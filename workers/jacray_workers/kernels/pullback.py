"""Pull many cotangents back through one autograd graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.vmap import vmap_increment_nesting
from torch.autograd.graph import Node

from jacray_workers.kernels.common import gradients
from jacray_workers.kernels.sweep import sweep
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.trust.finite import largest

# The two steps that torch.func.vmap is made of; not among torch's public names, the same since 2.0.
functorch: Any = torch._C._functorch

# What of `sweep`, `vmap` and `loop` was found right for so many cotangents of this shape.
Trust = dict[tuple[int, ...], str]


Way = Callable[[Tensor, Sequence["Point"], Tensor], "list[Tensor] | None"]


@dataclass(frozen=True, eq=False)
class Point:
    """A place in the graph whose cotangent is wanted, and what the tensor there looks like."""

    at: Any  # a Tensor or a GradientEdge; lists of both are what torch takes and its types do not
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Point:
        """The place of a tensor."""
        return cls(t, tuple(t.shape), t.dtype, t.device)

    def zeros(self, *lead: int) -> Tensor:
        """A cotangent of zeros."""
        return torch.zeros((*lead, *self.shape), dtype=self.dtype, device=self.device)


def pull(start: Tensor, points: Sequence[Point], vs: Tensor, trust: Trust | None = None) -> list[Tensor]:
    """The cotangents that `vs`, `(n, *start)`, bring to each point: `(n, *point)`; zeros where none arrives.

    All at once node by node (see `sweep`), else under `vmap`, else one after another. Batching rules have been wrong
    before: the first result is compared with a plain backward of a combination of the cotangents.

    Args:
        start: where the cotangents begin.
        points: where they are wanted.
        vs: the cotangents; may be an expanded view.
        trust: what earlier calls for the same graph and sizes found out.
    """
    if not points:
        return []
    known = None if trust is None else trust.get(tuple(vs.shape))
    if vs.shape[0] == 1 and known is None and trust is None:
        known = "loop"
    if known is not None:
        made = _WAYS[known](start, points, vs)
        if made is not None:
            return made
    for name, way in _WAYS.items():
        found = _attempt(way, start, points, vs)
        if found is not None and (name == "loop" or _agrees(start, points, vs, found)):
            if trust is not None:
                trust[tuple(vs.shape)] = name
            return found
    return _loop(start, points, vs)


def _attempt(way: Way, start: Tensor, points: Sequence[Point], vs: Tensor) -> list[Tensor] | None:
    try:
        return way(start, points, vs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error) or way is _loop:
            raise
        return None


def _agrees(start: Tensor, points: Sequence[Point], vs: Tensor, found: Sequence[Tensor]) -> bool:
    """Whether a plain backward of one combination of the cotangents gives that combination of the results."""
    if any(g.shape != (vs.shape[0], *p.shape) for g, p in zip(found, points, strict=True)):
        return False
    random = torch.Generator().manual_seed(0)
    k = (torch.rand(vs.shape[0], generator=random, dtype=torch.float64) + 0.5).to(vs.device, vs.real.dtype)
    plain = _loop(start, points, combination(k, vs).unsqueeze(0))
    return all(near(combination(k, g), p[0], g) for g, p in zip(found, plain, strict=True))


def combination(k: Tensor, t: Tensor) -> Tensor:
    """The sum of `k_i t_i` over the first axis."""
    k, by_sample = k.to(t.dtype), t.transpose(0, 1) if t.dim() > 1 else t
    if not t.is_contiguous() and by_sample.is_contiguous():
        # In the order in which it lies in memory: no copy of it is made.
        return (k @ by_sample.flatten(2)).unflatten(1, by_sample.shape[2:]) if t.dim() > 2 else by_sample @ k
    found: Tensor = torch.tensordot(k, t, dims=1)
    return found


def near(a: Tensor, b: Tensor, parts: Tensor) -> bool:
    """Whether two sums of the same parts are equal up to the rounding of such a sum."""
    tolerance = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3, torch.complex64: 1e-3}
    if a.numel() == 0:
        return True
    size = largest(parts)
    if not math.isfinite(size):
        # One cotangent's after the other: what is made here of all of them may not fit beside them.
        size = max(float(torch.nan_to_num(part.abs(), nan=0.0, posinf=0.0).amax()) for part in parts)
    rtol = tolerance.get(a.dtype, 0.1)
    return torch.allclose(a, b, rtol=rtol, atol=size * parts.shape[0] ** 0.5 * rtol, equal_nan=True)


def _sweep(start: Tensor, points: Sequence[Point], vs: Tensor) -> list[Tensor] | None:
    found = sweep(start, [p.at for p in points], vs)
    if found is None:
        return None
    return [p.zeros(vs.shape[0]) if g is None else g for p, g in zip(points, found, strict=True)]


def _together(start: Tensor, points: Sequence[Point], vs: Tensor) -> list[Tensor]:
    """What `torch.func.vmap` around a backward does, less the handling of pytrees, which costs small models dear."""
    count = vs.shape[0]
    lazy_load_decompositions()
    with vmap_increment_nesting(count, "error") as level:
        v = functorch._add_batch_dim(vs, 0, level)
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            start, [p.at for p in points], v, retain_graph=True, allow_unused=True
        )
        return [
            p.zeros(count) if g is None else functorch._remove_batch_dim(g, level, count, 0)
            for p, g in zip(points, grads, strict=True)
        ]


def _loop(start: Tensor, points: Sequence[Point], vs: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    last = vs.shape[0] - 1
    for i, v in enumerate(vs):
        grads = gradients(start, [p.at for p in points], v, keep=True)
        filled = [p.zeros() if g is None else g for p, g in zip(points, grads, strict=True)]
        if last == 0:
            return [g.unsqueeze(0) for g in filled]
        found = found or [g.new_empty(last + 1, *g.shape) for g in filled]
        for target, g in zip(found, filled, strict=True):
            target[i] = g
    return found or [p.zeros(0) for p in points]


_WAYS: dict[str, Way] = {"sweep": _sweep, "vmap": _together, "loop": _loop}


def nodes_from(root: Node | None) -> set[Node]:
    """Every node of the graph that cotangents starting at `root` may pass."""
    found: set[Node] = set()
    waiting = [root] if root is not None else []
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return found
