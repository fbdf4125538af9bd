"""The slope of a function along a direction by central differences, with an estimate of its own error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacray_workers.trust.reference import Point

# Steps relative to the leaves' size. The first suits a smooth function; a smaller one steps over fewer kinks, and a
# larger one rises above the noise of a model that rounds inside.
STEPS = {torch.float64: (2.0**-15, 2.0**-21, 2.0**-9), torch.float32: (2.0**-6, 2.0**-9)}
# Disagreement between two steps, relative to the slope, that still counts as smooth.
SMOOTH = 1e-3


@dataclass(frozen=True)
class Slope:
    """A slope `(rows,)`, how far each entry may be off, and whether two step sizes agree on it."""

    value: Tensor
    error: Tensor
    smooth: bool


def slope(point: Point, direction: Sequence[Tensor], good: float) -> Slope | None:
    """The slope of the sample's outputs along a direction, from the step size that agrees best with its half.

    Args:
        point: the sample.
        direction: `(*leaf)` for each leaf, of about the leaf's size.
        good: the relative disagreement below which no other step is tried.

    Returns:
        The slope, or None where the precision is too low for differences or no step gives finite numbers.
    """
    values = point.values()
    best: Slope | None = None
    score = float("inf")
    for step in STEPS.get(point.problem.dtype, ()):
        found = _difference(point, values, direction, step)
        size = _rms(found.value)
        relative = _rms(found.error) / size if size else _rms(found.error)
        if relative < score:
            best, score = Slope(found.value, found.error, relative <= SMOOTH), relative
        if score <= good:
            break
    return best


def _difference(point: Point, values: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> Slope:
    """Richardson's combination of the differences at a step and at half of it."""
    coarse, size = _central(point, values, direction, step)
    fine, _ = _central(point, values, direction, step / 2)
    rounded = 8 * torch.finfo(point.problem.dtype).eps * size / step
    return Slope((4 * fine - coarse) / 3, (fine - coarse).abs() + rounded, True)


def _central(point: Point, values: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> tuple[Tensor, Tensor]:
    ahead, behind = point.moved(values, direction, step), point.moved(values, direction, -step)
    return (ahead - behind) / (2 * step), torch.maximum(ahead.abs(), behind.abs())


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
