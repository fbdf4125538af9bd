"""What has come to each place of an autograd graph so far, and which memory nothing else refers to.

A walk back makes tensors that are used once: a sum or a product is written over what it was made of where that is
known to be the walk's own, for fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from jacray_workers import pages

Place = tuple[Node, int]


class Arrived:
    """The sums of what has come to each place so far."""

    def __init__(self) -> None:
        self._sums: dict[Place, Tensor] = {}
        # Memory that the walk itself made; what was freed in between can only have become its own again.
        self._fresh: set[int] = set()
        # Memory that a caller gets.
        self._given: set[int] = set()

    def take(self, place: Place) -> Tensor | None:
        """What came to a place that nothing more comes to."""
        return self._sums.pop(place, None)

    def note(self, made: Sequence[Tensor | None], of: Tensor) -> None:
        """What a rule made of some cotangents: never memory that anything else refers to, but perhaps theirs."""
        self._fresh.update({_memory(g) for g in made if g is not None} - {_memory(of)})

    def given(self, g: Tensor) -> Tensor:
        """A tensor that leaves the walk, and is not to be written over."""
        self._given.add(_memory(g))
        return g

    def spare(self, g: Tensor, kept: Collection[int] = ()) -> bool:
        """Whether a tensor, now at no place, may be written over: nothing else lies in its memory, nor in `kept`."""
        memory = _memory(g)
        if memory not in self._fresh or memory in self._given or memory in kept:
            return False
        if g.untyped_storage().nbytes() != g.nbytes or any(
            s == 0 < n - 1 for s, n in zip(g.stride(), g.shape, strict=True)
        ):
            return False
        return all(_memory(other) != memory for other in self._sums.values())

    def add_all(self, places: Sequence[tuple[Node | None, int]], gs: Sequence[Tensor | None]) -> None:
        """Something more for each of some places, in its precision."""
        pairs = [
            ((node, nr), typed(node, nr, g))
            for (node, nr), g in zip(places, gs, strict=True)
            if node is not None and g is not None
        ]
        for i, (place, g) in enumerate(pairs):
            self._add(place, g, {_memory(other) for _, other in pairs[i + 1 :]})

    def _add(self, place: Place, g: Tensor, kept: Collection[int]) -> None:
        before = self._sums.pop(place, None)
        self._sums[place] = g if before is None else self._sum(shaped(*place, before), shaped(*place, g), kept)

    def _sum(self, before: Tensor, g: Tensor, kept: Collection[int]) -> Tensor:
        """Both, in the memory of one of them if possible."""
        if _memory(before) != _memory(g):
            if self.spare(g, kept):
                return g.add_(before)
            if self.spare(before, kept):
                return before.add_(g)
        both = torch.add(before, g, out=as_it_lies(g)) if before.dtype == g.dtype else before + g
        self._fresh.add(_memory(both))
        return both

    def add_part(self, place: tuple[Node | None, int], part: tuple[Any, ...], g: Tensor) -> None:
        """Something more in a part of what is there."""
        node, nr = place
        if node is None:
            return
        g = typed(node, nr, g)
        before = self._sums.pop((node, nr), None)
        whole = _zeros(node, nr, g) if before is None else shaped(node, nr, before)
        if before is not None and (_memory(whole) == _memory(g) or not self.spare(whole)):
            whole = whole.clone()
        self._fresh.add(_memory(whole))
        whole[(slice(None), *part)].add_(g)
        self._sums[node, nr] = whole


def shaped(node: Node, nr: int, g: Tensor) -> Tensor:
    """Cotangents in the shape that a node's output has; a rule may have left several axes where it has one."""
    shape = node._input_metadata[nr].shape
    return g if g.shape[1:] == shape else pages.reshaped(g, (g.shape[0], *shape))


def typed(node: Node, nr: int, g: Tensor) -> Tensor:
    """Cotangents in the precision of a node's output; of complex ones at a real output the real part."""
    dtype = node._input_metadata[nr].dtype
    if g.dtype == dtype:
        return g
    return (g.real if g.is_complex() and not dtype.is_complex else g).to(dtype)


def samples_first(g: Tensor) -> bool:
    """Whether the cotangents of one sample lie together in memory."""
    return g.dim() > 1 and g.stride(0) < g.stride(1)


def as_it_lies(g: Tensor) -> Tensor:
    """Memory for as many numbers in the same order."""
    repeats = any(stride == 0 for stride in g.stride())
    order = list(range(g.dim())) if repeats else sorted(range(g.dim()), key=g.stride, reverse=True)
    return pages.like(g, [g.shape[d] for d in order]).permute([order.index(d) for d in range(g.dim())])


def in_rows(g: Tensor, keep: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The cotangents as `(everything, *last axes)` in their order in memory, and the way back."""
    by_sample = g.dim() >= keep + 2 and samples_first(g)
    g = g.transpose(0, 1) if by_sample else g
    lead, last = g.shape[: g.dim() - keep], g.shape[g.dim() - keep :]

    def back(t: Tensor) -> Tensor:
        parts: Tensor = t.unflatten(0, lead)
        return parts.transpose(0, 1) if by_sample else parts

    return pages.reshaped(g, (math.prod(lead), *last)), back


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _zeros(node: Node, nr: int, g: Tensor) -> Tensor:
    """Cotangents of zeros, in memory as those of a part of it are."""
    shape = node._input_metadata[nr].shape
    if samples_first(g) and shape and shape[0] == g.shape[1]:
        return g.new_zeros(shape[0], g.shape[0], *shape[1:]).transpose(0, 1)
    return g.new_zeros(g.shape[0], *shape)
