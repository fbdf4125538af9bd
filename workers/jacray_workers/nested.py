"""Numbers in nested lists, as specs write them, turned into tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain

DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_AXES = 16


def tensor_of(value: Any, argument: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor from a number or from lists of numbers, nested evenly.

    Raises:
        InputError: naming the place of the first entry that is no number, or of the first list of another length.
    """
    if isinstance(value, Tensor):
        return value.to(dtype)
    shape = check_nested(value, argument)
    rule = f"must hold numbers that fit {str(dtype)[6:]}"
    try:
        found = torch.tensor(value, dtype=dtype).reshape(shape)
        exact = torch.tensor(value, dtype=torch.float64).reshape(shape)
    except (OverflowError, RuntimeError, ValueError, TypeError):
        raise InputError(argument, rule, value) from None
    # torch rounds what is too large to infinity, cuts fractions off and wraps around, without a word.
    changed = found.isinf() != exact.isinf() if dtype.is_floating_point else found.double() != exact
    if bool(changed.any()):
        raise InputError(argument, rule, value)
    return found


def check_nested(value: Any, argument: str) -> tuple[int, ...]:
    """The shape of lists of numbers that are nested evenly; a number has none.

    Raises:
        InputError: naming the place of the first entry that is no number, or of the first list of another length.
    """
    shape = _shape(value, argument)
    _check(value, shape, argument)
    return shape


def _shape(value: Any, argument: str) -> tuple[int, ...]:
    shape: list[int] = []
    while isinstance(value, list | tuple):
        shape.append(len(value))
        if len(shape) > MAX_AXES:
            raise InputError(argument, f"must nest at most {MAX_AXES} deep", Plain("a deeper list"))
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _check(value: Any, shape: tuple[int, ...], path: str) -> None:
    if not shape:
        if not isinstance(value, int | float):
            rule = "must be nested evenly" if isinstance(value, list | tuple) else "must be a number"
            raise InputError(path, rule, value)
        return
    if not isinstance(value, list | tuple):
        raise InputError(path, f"must be a list of {shape[0]}, as the first one is", value)
    if len(value) != shape[0]:
        raise InputError(path, f"must have {shape[0]} entries, as the first one has", Plain(f"{len(value)} entries"))
    for i, part in enumerate(value):
        _check(part, shape[1:], f"{path}.{i}" if path else str(i))
