"""Arguments of a graph's calls as JSON: plain numbers and texts, and objects of one key for everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jacray_workers.errors import ModelError, shorten

MAX_LIST = 10_000


@dataclass(frozen=True)
class Ref:
    """The value of an input or an earlier call, by its number."""

    index: int


@dataclass(frozen=True)
class State:
    """A parameter, buffer or constant, by its name."""

    name: str


@dataclass(frozen=True)
class Here:
    """The device that the inputs are on."""


_FLOATS = {"inf": math.inf, "-inf": -math.inf}
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "bfloat16", "float16", "complex128", "complex64",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}


def decode(value: Any, depth: int = 0) -> Any:
    """From JSON.

    Raises:
        ModelError: it is none of the forms that `encode` writes.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list) and len(value) <= MAX_LIST and depth < 3:
        return [decode(part, depth + 1) for part in value]
    if isinstance(value, Mapping) and len(value) == 1:
        found = _tagged(*next(iter(value.items())))
        if found is not None:
            return found
    raise ModelError("model", "holds an argument of no known form in its graph", shorten(value))


def _tagged(tag: str, inner: Any) -> Any:
    if tag == "v" and isinstance(inner, int) and not isinstance(inner, bool) and inner >= 0:
        return Ref(inner)
    if not isinstance(inner, str):
        return None
    if tag == "state":
        return State(inner)
    if tag == "device":
        return Here() if inner == "here" else None
    if tag == "layout":
        return torch.strided if inner == "strided" else None
    tables: dict[str, Mapping[str, Any]] = {"dtype": _DTYPES, "format": _FORMATS, "float": _FLOATS}
    return tables.get(tag, {}).get(inner)


def encode(value: Any) -> Any:
    """To JSON.

    Raises:
        ModelError: the value cannot stand in a graph file.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": _infinite(value)}
    if isinstance(value, list | tuple):
        return [encode(part) for part in value]
    tag, inner = _tag(value)
    if not tag:
        raise ModelError("model", "passes an argument to an operator that graph files cannot hold", shorten(value))
    return {tag: inner}


def _tag(value: Any) -> tuple[str, Any]:
    found: tuple[str, Any] = ("", None)
    if isinstance(value, Ref):
        found = ("v", value.index)
    elif isinstance(value, State):
        found = ("state", value.name)
    elif isinstance(value, torch.device | Here):
        found = ("device", "here")
    elif isinstance(value, torch.dtype) and str(value)[6:] in _DTYPES:
        found = ("dtype", str(value)[6:])
    elif isinstance(value, torch.memory_format) and str(value)[6:] in _FORMATS:
        found = ("format", str(value)[6:])
    elif value is torch.strided:
        found = ("layout", "strided")
    return found


def _infinite(value: float) -> str:
    if math.isnan(value):
        raise ModelError("model", "passes NaN to an operator, which graph files do not hold", value)
    return "inf" if value > 0 else "-inf"
