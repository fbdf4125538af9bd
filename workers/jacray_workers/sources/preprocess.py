"""What a spec does to inputs before the model sees them: each step a pure function of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.specs import Cast, Normalise, Reshape, Scale
from jacray_workers.validation import nearest

AnyStep = Cast | Scale | Reshape | Normalise


def preprocess(parts: Mapping[str, Tensor], steps: Sequence[AnyStep], argument: str) -> dict[str, Tensor]:
    """The inputs by name after every step.

    Raises:
        InputError: a step names no input, needs floats, or does not fit the shape.
    """
    found = dict(parts)
    for place, step in enumerate(steps):
        where = f"{argument}.{place}"
        if step.of is not None and step.of not in found:
            known = [name for name in found if name]
            way_out = nearest(step.of, known) if known else "there is one bare input: leave `of` out"
            raise InputError(f"{where}.of", "names no input", step.of, way_out)
        for name in [step.of] if step.of is not None else list(found):
            found[name] = _apply(step, found[name], where)
    return found


def _apply(step: AnyStep, x: Tensor, where: str) -> Tensor:
    if isinstance(step, Cast):
        return x.to(getattr(torch, step.dtype))
    if isinstance(step, Reshape):
        return _reshape(step, x, where)
    if not x.is_floating_point():
        raise InputError(where, f"{step.kind} needs floats", Plain(str(x.dtype)[6:]), "put a cast before it")
    if isinstance(step, Scale):
        return x * step.factor + step.offset
    return (x - _along(step.mean, step.axis, x, f"{where}.mean")) / _along(step.std, step.axis, x, f"{where}.std")


def _reshape(step: Reshape, x: Tensor, where: str) -> Tensor:
    try:
        return x.reshape(x.shape[0], *step.shape)
    except RuntimeError:
        sample = Plain(f"a sample of shape {list(x.shape[1:])}")
        raise InputError(
            f"{where}.shape", f"must hold as many numbers as a sample: {list(step.shape)}", sample
        ) from None


def _along(numbers: Any, axis: int, x: Tensor, where: str) -> Tensor:
    """The numbers in a shape that broadcasts along one axis of `x`."""
    values = torch.tensor(numbers, dtype=x.dtype)
    if values.dim() == 0:
        return values
    if not -x.dim() <= axis < x.dim() or axis % x.dim() == 0 or x.shape[axis] != len(values):
        shown = Plain(f"{len(values)} numbers along axis {axis} of {list(x.shape)}")
        raise InputError(where, "must have a number for each place along the axis", shown)
    shape = [1] * x.dim()
    shape[axis] = len(values)
    return values.reshape(shape)
