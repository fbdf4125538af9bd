"""Operators that work number by number, with a parameter spread over the batch by broadcasting."""

from __future__ import annotations

from torch import Tensor

from jacray_workers.kernels.pullback import Point, pull
from jacray_workers.rules.common import Terms, Unfit, Use, at, by_sample
from jacray_workers.taps.follow import outputs, swap, walk, writes
from jacray_workers.taps.sites import Path

BINARY = ("input", "other")


def add(use: Use) -> Terms:
    """`x + p`: the cotangent itself, summed over the axes along which p was spread."""
    if use.tap.kwargs or len(use.tap.args) != 2:
        return elementwise(use)
    return {path: use.summed(path, _real(use, path)) for path in use.tap.sources}


def _real(use: Use, path: Path) -> Tensor:
    if use.cots.is_complex() or not use.tap.sources[path].tensor.is_floating_point():
        raise Unfit("complex")
    return use.cots


def multiply(use: Use) -> Terms:
    """`x * p`: the cotangent times the data, summed likewise."""
    if use.tap.kwargs or len(use.tap.args) != 2 or len(use.tap.sources) != 1:
        return elementwise(use)
    ((path, _),) = use.tap.sources.items()
    other: Path = (1 - int(path[0]),)
    x = at(use.tap, other)
    if not isinstance(x, Tensor) or x.is_complex():
        return elementwise(use)
    aligned = _aligned(use, other, use.cots.dim() - 2)
    return {path: use.summed(path, _real(use, path) * aligned.unsqueeze(1))}


def elementwise(use: Use) -> Terms:
    """Any broadcasting operator: with the parameter spread beforehand, its derivative is one number per number."""
    tap, dims = use.tap, use.cots.dim() - 2
    batch, shape = use.cots.shape[0], use.cots.shape[2:]
    everything = {path: _aligned(use, path, dims) for path, _ in walk(tap.args, tap.kwargs) if path not in tap.sources}
    spread = {
        path: source.tensor.detach().expand(batch, *shape).detach().requires_grad_()
        for path, source in tap.sources.items()
    }
    if writes(tap.site.func):
        everything = {path: t.clone() if path == (0,) else t for path, t in everything.items()}
    args, kwargs = swap(tap.args, tap.kwargs, {**everything, **spread})
    made = outputs(tap.site.func, args, tap.site.func(*args, **kwargs))[0]
    if made.shape != (batch, *shape):
        raise Unfit("shape")
    points = [Point.of(t) for t in spread.values()]
    pulled = pull(made, points, use.cots.transpose(0, 1))
    return {path: use.summed(path, t.transpose(0, 1)) for path, t in zip(spread, pulled, strict=True)}


def _aligned(use: Use, path: Path, dims: int) -> Tensor:
    """An argument as `(B, *shape)` with as many axes as the result, or as it is where it holds no batch."""
    t: Tensor = at(use.tap, path)
    if use.tap.site.fits[path] is None:
        # Without a batch axis of its own it must not meet the one that leads all others.
        return t.unsqueeze(0) if t.dim() == dims else t
    found = by_sample(use.tap, path)
    return found.reshape(found.shape[0], *(1,) * (dims - found.dim() + 1), *found.shape[1:])


def broadcast(use: Use) -> Terms:
    """`p.expand(...)`: summed over the axes along which it was spread."""
    ((path, _),) = use.tap.sources.items()
    return {path: use.summed(path, _real(use, path))}


def repeat(use: Use) -> Terms:
    """`p.repeat(...)`: every axis is a number of copies times its own size."""
    ((path, _),) = use.tap.sources.items()
    own, t = use.own(path), _real(use, path)
    extra = t.dim() - 2 - len(own)
    t = t.flatten(2, 1 + extra).sum(dim=2) if extra else t
    for i, n in enumerate(own, start=2):
        t = t.unflatten(i, (-1, n)).sum(dim=i) if n else t
    return {path: use.dense(path, t)}


FUNCTIONS = ("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "where", "lerp", "addcmul",
             "addcdiv", "atan2", "hypot", "fmod", "remainder", "copysign", "xlogy", "logaddexp", "clamp", "heaviside",
             "ldexp", "masked_fill", "subtract", "multiply", "divide", "rsub", "special_xlog1py", "clamp_min",
             "clamp_max", "logaddexp2", "fmax", "fmin")  # fmt: skip
DUNDERS = ("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__",
           "__truediv__", "__rtruediv__", "__itruediv__", "__div__", "__rdiv__", "__idiv__", "__pow__", "__rpow__",
           "__ipow__")  # fmt: skip
