"""`weights` and `vectors` as specs write them: numbers, a one-hot of a field, or arrays from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from jacray_workers.errors import InputError, Plain, SpecError
from jacray_workers.nested import tensor_of
from jacray_workers.sources.loader import Loaded, load
from jacray_workers.sources.specs import DirectionSpec, OneHot
from jacray_workers.validation import explain, nearest

_ADAPTER: TypeAdapter[Any] = TypeAdapter(DirectionSpec)


def check_directions(value: Any, argument: str) -> None:
    """Refuse what `directions` cannot read, without reading anything.

    Raises:
        SpecError: naming the key, the rule, the value and the nearest known name.
    """
    if isinstance(value, Mapping) and "kind" in value:
        _spec(value, argument)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            check_directions(part, f"{argument}.{name}")
    elif value is not None and not bool(torch.isfinite(tensor_of(value, argument)).all()):
        raise SpecError(argument, "must be finite numbers", value)


def directions(value: Any, loaded: Loaded, base: Path, classes: Callable[[], int], argument: str) -> Any:
    """The tensors that a spec's `weights` or `vectors` stand for.

    Args:
        value: numbers in nested lists, `{kind: one_hot, of: FIELD}`, any input spec, a mapping from names to these,
            or None.
        loaded: the job's inputs.
        base: the folder that relative paths start from.
        classes: tells the model's number of outputs; asked only where a one-hot leaves it open.
        argument: `weights` or `vectors`, for errors.

    Returns:
        A tensor, a dict of them, or None.

    Raises:
        SpecError, InputError: naming the key, the rule, the value and the nearest known name.
    """
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping) and "kind" not in value:
        return {name: directions(v, loaded, base, classes, f"{argument}.{name}") for name, v in value.items()}
    if not isinstance(value, Mapping):
        return tensor_of(value, argument)
    spec = _spec(value, argument)
    if isinstance(spec, OneHot):
        return _one_hot(spec, loaded, classes, argument)
    return load(spec, base, argument).inputs


def _spec(value: Mapping[str, Any], argument: str) -> Any:
    try:
        return _ADAPTER.validate_python(dict(value))
    except ValidationError as error:
        raise SpecError(*explain(error, DirectionSpec, argument)) from None


def _one_hot(spec: OneHot, loaded: Loaded, classes: Callable[[], int], argument: str) -> Tensor:
    if spec.of not in loaded.fields:
        known = list(loaded.fields)
        way_out = nearest(spec.of, known) if known else "these inputs have no fields"
        raise InputError(f"{argument}.of", "names no field of the inputs", spec.of, way_out)
    field = loaded.fields[spec.of]
    if field.dim() != 1 or field.is_floating_point():
        shown = Plain(f"{str(field.dtype)[6:]} of shape {tuple(field.shape)}")
        raise InputError(f"{argument}.of", "must name a field with one whole number per sample", shown)
    count = spec.classes or classes()
    low, high = int(field.min()), int(field.max())
    if low < 0 or high >= count:
        raise InputError(f"{argument}.of", f"must hold classes from 0 to {count - 1}", Plain(f"{low} to {high}"))
    return torch.nn.functional.one_hot(field.to(torch.int64), count).to(torch.float32)
