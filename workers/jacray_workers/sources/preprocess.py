"""What a spec does to inputs before the model sees them: each step a pure function of some samples' tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Part
from jacray_workers.sources.places import Reach
from jacray_workers.sources.steps import (
    AnyStep,
    Cast,
    Clip,
    Normalise,
    OneHotStep,
    Permute,
    Reshape,
    Scale,
    Select,
    Tokenize,
)  # fmt: skip
from jacray_workers.validation import nearest


@dataclass(frozen=True)
class Bound:
    """A step with what it needs beside the samples. Picklable.

    Attributes:
        step: its spec.
        where: what it is called in errors.
        tool: of a tokenizer, the tokenizer.
    """

    step: AnyStep
    where: str
    tool: Any = None


def bind(steps: Sequence[AnyStep], base: Path, argument: str, reach: Reach) -> tuple[Bound, ...]:
    """The steps with their files found.

    Raises:
        InputError: a file is not there.
    """
    return tuple(_bound(step, base, f"{argument}.{place}", reach) for place, step in enumerate(steps))


def _bound(step: AnyStep, base: Path, where: str, reach: Reach) -> Bound:
    if not isinstance(step, Tokenize):
        return Bound(step, where)
    from jacray_workers.sources.tokens import tokenizer_of

    return Bound(step, where, tokenizer_of(step, base, where, reach))


def preprocess(parts: Mapping[str, Part], steps: Sequence[Bound], start: int = 0) -> dict[str, Part]:
    """The inputs by name after every step.

    Args:
        parts: some rows of each input.
        steps: in their order.
        start: the place of the first row, for errors.

    Raises:
        InputError: a step names no input, needs numbers of another type, does not fit the shape, or would give a
            number that its type cannot hold.
    """
    found = dict(parts)
    for bound in steps:
        of = bound.step.of
        if of is not None and of not in found:
            known = [name for name in found if name]
            way_out = nearest(of, known) if known else "there is one bare input: leave `of` out"
            raise InputError(f"{bound.where}.of", "names no input", of, way_out)
        if isinstance(bound.step, Tokenize):
            found = _tokens(bound, found)
            continue
        for name in [of] if of is not None else list(found):
            found[name] = _apply(bound.step, _numbers(found[name], bound.where), bound.where, start)
    return found


def _numbers(part: Part, where: str) -> Tensor:
    if not isinstance(part, Tensor):
        raise InputError(where, "needs numbers", Plain("texts"), "put a tokenize step before it")
    return part


def _tokens(bound: Bound, parts: dict[str, Part]) -> dict[str, Part]:
    """The one input of texts, as token ids; the others stay."""
    texts = [name for name, part in parts.items() if not isinstance(part, Tensor) and bound.step.of in (None, name)]
    if len(texts) != 1:
        shown = Plain(f"{len(texts)} inputs of texts")
        raise InputError(bound.where, "needs one input of texts, named by `of` where there are several", shown)
    kept = {name: part for name, part in parts.items() if name != texts[0]}
    made: dict[str, Part] = bound.tool(parts[texts[0]])
    # Alone, the ids take the place of the texts.
    made = made if "attention_mask" in made else {texts[0]: made["input_ids"]}
    if twice := sorted(set(kept) & set(made)):
        raise InputError(bound.where, "gives an input that is there already", twice[0])
    return kept | made


def _apply(step: AnyStep, x: Tensor, where: str, start: int) -> Tensor:
    if isinstance(step, Scale | Normalise | Clip) and not x.is_floating_point():
        raise InputError(where, f"{step.kind} needs floats", Plain(str(x.dtype)[6:]), "put a cast before it")
    made = _STEPS[type(step)](step, x, where)
    # Not for steps that only move numbers about. NaN stays what it was: `nan_policy` says what becomes of it.
    if isinstance(step, Cast | Scale | Normalise) and made.is_floating_point() and x.is_floating_point():
        _check_finite(made, x, where, start)
    return made


def _check_finite(made: Tensor, x: Tensor, where: str, start: int) -> None:
    bad = ~torch.isfinite(made) & torch.isfinite(x)
    if bool(bad.any()):
        sample = start + int(bad.reshape(bad.shape[0], -1).any(dim=1).nonzero()[0])
        shown = Plain(f"sample {sample}")
        raise InputError(where, f"must not turn finite numbers into infinite ones of {str(made.dtype)[6:]}", shown)


def _cast(step: Cast, x: Tensor, where: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, step.dtype)
    if not dtype.is_floating_point and dtype != torch.bool and x.numel():
        low, high = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        least, most = x.min().item(), x.max().item()
        # NaN fails every comparison. 2**63 - 1 is no float, and rounds up.
        fits = low <= least and most <= high and not (x.is_floating_point() and most >= 2**63)
        if not fits:
            raise InputError(where, f"must be given numbers that fit {step.dtype}", Plain(f"{least} to {most}"))
    return x.to(dtype)


def _scale(step: Scale, x: Tensor, _where: str) -> Tensor:
    return x * step.factor + step.offset


def _clip(step: Clip, x: Tensor, _where: str) -> Tensor:
    return x.clamp(step.min, step.max)


def _reshape(step: Reshape, x: Tensor, where: str) -> Tensor:
    try:
        return x.reshape(x.shape[0], *step.shape)
    except RuntimeError:
        sample = Plain(f"a sample of shape {list(x.shape[1:])}")
        raise InputError(
            f"{where}.shape", f"must hold as many numbers as a sample: {list(step.shape)}", sample
        ) from None


def _normalise(step: Normalise, x: Tensor, where: str) -> Tensor:
    return (x - _along(step.mean, step.axis, x, f"{where}.mean")) / _along(step.std, step.axis, x, f"{where}.std")


def _along(numbers: Any, axis: int, x: Tensor, where: str) -> Tensor:
    """The numbers in a shape that broadcasts along one axis of `x`."""
    values = torch.tensor(numbers, dtype=torch.float64).to(x.dtype)
    if bool(~torch.isfinite(values).all()) or (where.endswith("std") and bool((values == 0).any())):
        raise InputError(where, f"must be numbers that {str(x.dtype)[6:]} can hold", numbers)
    if values.dim() == 0:
        return values
    if not -x.dim() <= axis < x.dim() or axis % x.dim() == 0 or x.shape[axis] != len(values):
        shown = Plain(f"{len(values)} numbers along axis {axis} of {list(x.shape)}")
        raise InputError(where, "must have a number for each place along the axis", shown)
    shape = [1] * x.dim()
    shape[axis] = len(values)
    return values.reshape(shape)


def _select(step: Select, x: Tensor, where: str) -> Tensor:
    if not -x.dim() <= step.axis < x.dim() or step.axis % x.dim() == 0:
        shown = Plain(f"{step.axis} of {list(x.shape)}")
        raise InputError(f"{where}.axis", "must be an axis of a sample; `range` cuts the batch", shown)
    length = x.shape[step.axis]
    highest = max(step.indices) if step.indices is not None else (step.range or (0, 0))[1] - 1
    if highest >= length:
        key = "indices" if step.indices is not None else "range"
        raise InputError(f"{where}.{key}", f"must lie within the {length} places along axis {step.axis}", highest)
    if step.indices is None:
        start, stop = step.range or (0, length)
        return x.narrow(step.axis, start, stop - start)
    return x.index_select(step.axis, torch.tensor(step.indices))


def _permute(step: Permute, x: Tensor, where: str) -> Tensor:
    if len(step.axes) != x.dim() - 1:
        sample = Plain(f"a sample of shape {list(x.shape[1:])}")
        raise InputError(f"{where}.axes", f"must name each axis of a sample; it names {len(step.axes)}", sample)
    return x.permute(0, *(axis + 1 for axis in step.axes)).contiguous()


def _one_hot(step: OneHotStep, x: Tensor, where: str) -> Tensor:
    if x.is_floating_point() or x.dtype == torch.bool:
        raise InputError(where, "one_hot needs whole numbers", Plain(str(x.dtype)[6:]), "put a cast to int64 before it")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= step.classes:
        raise InputError(
            f"{where}.classes",
            f"must be more than every number; {step.classes} allow 0 to {step.classes - 1}",
            Plain(f"{low} to {high}"),
        )
    return torch.nn.functional.one_hot(x.to(torch.int64), step.classes).to(torch.float32)


_STEPS: dict[type[Any], Callable[[Any, Tensor, str], Tensor]] = {
    Cast: _cast,
    Scale: _scale,
    Clip: _clip,
    Reshape: _reshape,
    Normalise: _normalise,
    Select: _select,
    Permute: _permute,
    OneHotStep: _one_hot,
}
