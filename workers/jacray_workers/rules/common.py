"""What the rules share: a tap's arguments by name, seen sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers.blocks.terms import Dense, Term
from jacray_workers.taps.follow import Tap, another_path
from jacray_workers.taps.sites import OUT, Axis, Path, split

Terms = dict[Path, Term]
MISSING = object()


class Unfit(Exception):  # noqa: N818  # a signal to take the general rule, not an error
    """A rule does not hold for this use of the operator."""


@dataclass(frozen=True, eq=False)
class Use:
    """A tap together with the cotangents that arrived at it.

    Attributes:
        tap: the call.
        names: its arguments' names in order.
        g: the cotangents as they arrived, `(R, *result)`.
        cots: the same by sample, `(B, R, *result of a batch of one)`.
    """

    tap: Tap
    names: tuple[str, ...]
    g: Tensor
    cots: Tensor

    def path(self, name: str) -> Path | None:
        """Where an argument stands in the call, or None where it was not given."""
        place = self.names.index(name)
        if place < len(self.tap.args):
            return (place,)
        return (name,) if name in self.tap.kwargs else None

    def value(self, name: str, default: Any = MISSING) -> Any:
        """An argument as it was given."""
        path = self.path(name)
        if path is None:
            if default is MISSING:
                raise Unfit(name)
            return default
        return at(self.tap, path)

    def source(self, name: str) -> Path | None:
        """The argument's path where it is a parameter."""
        path = self.path(name)
        return path if path in self.tap.sources else None

    def own(self, path: Path) -> tuple[int, ...]:
        """The shape of the parameter at a path."""
        return tuple(self.tap.sources[path].tensor.shape)

    def axis(self, name: str) -> Axis:
        """Where the batch lies in an argument.

        Raises:
            Unfit: it is a parameter, or holds no batch.
        """
        path = self.path(name)
        axis = None if path is None or path in self.tap.sources else self.tap.site.axis(path)
        if axis is None:
            raise Unfit(name)
        return axis

    @property
    def out_axis(self) -> Axis:
        """Where the batch lies in the result."""
        axis = self.tap.site.axis(OUT)
        if axis is None:
            raise Unfit("result")
        return axis

    def samples(self, name: str) -> Tensor:
        """An argument by sample, `(B, *shape in a batch of one)`."""
        path = self.path(name)
        if path is None:
            raise Unfit(name)
        self.axis(name)
        return by_sample(self.tap, path)

    def dense(self, path: Path, block: Tensor) -> Term:
        """A dense term for the parameter at a path."""
        return Dense(self.own(path), None, block)

    def summed(self, path: Path, t: Tensor) -> Term:
        """The dense term that adds `t`, `(B, R, *result)`, over the axes along which the parameter was spread."""
        return self.dense(path, sum_to(t, self.own(path)))


Rule = Callable[[Use], Terms]


def at(tap: Tap, path: Path) -> Any:
    """What stands at a path among a tap's arguments."""
    value: Any = tap.args if isinstance(path[0], int) else tap.kwargs
    for key in path:
        value = value[key]
    return value.detach() if isinstance(value, Tensor) else value


def by_sample(tap: Tap, path: Path) -> Tensor:
    """A tensor argument by sample.

    Raises:
        Unfit: the probe could not tell how the batch lies in it, and for this batch it matters.
    """
    fits = tap.site.fits[path]
    t: Tensor = at(tap, path)
    if fits is None:
        raise Unfit(str(path))
    first = split(t, fits[0], tap.size)
    if any(not torch.equal(first, split(t, other, tap.size)) for other in fits[1:]):
        raise Unfit(str(path))
    return first


def use(tap: Tap, names: tuple[str, ...], g: Tensor) -> Use:
    """The tap with the cotangents `(R, *target)` that arrived at its target."""
    if tap.target.window is not None:
        size, stride, offset = tap.target.window
        g = g.contiguous()
        g = g.as_strided((g.shape[0], *size), (g.stride(0), *stride), g.storage_offset() + offset)
    axis = tap.site.axis(OUT)
    if axis is None:
        raise another_path()
    return Use(tap, names, g, split(g, axis, tap.size, lead=1).transpose(0, 1))


def sum_to(t: Tensor, own: tuple[int, ...]) -> Tensor:
    """`(B, R, *shape)` summed to `(B, R, *own)`, `own` being spread over `shape` by the rules of broadcasting."""
    extra = t.dim() - 2 - len(own)
    if extra > 0:
        t = t.flatten(2, 1 + extra).sum(dim=2) if extra > 1 or t.shape[2] > 1 else t.squeeze(2)
    spread = [i for i, n in enumerate(own, start=2) if n == 1 and t.shape[i] != 1]
    return t.sum(dim=spread, keepdim=True) if spread else t
