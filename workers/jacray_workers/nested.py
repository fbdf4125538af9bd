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
    shape = _shape(value, argument)
    _check(value, shape, argument)
    try:
        return torch.tensor(value, dtype=dtype).reshape(shape)
    except (OverflowError, RuntimeError, ValueError, TypeError):
        raise InputError(argument, f"must hold numbers that fit {str(dtype)[6:]}", value) from None


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
