"""What small work can be computed together with: the same model, request and shapes, whatever the numbers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from jacray.http.wire import About, Header
from jacray.http.work import DIRECTIONS


def kind_of(about: About, header: Header | None) -> tuple[Hashable | None, int]:
    """The kind of a piece of work, or None where it goes alone, and how many samples it holds."""
    request, inputs = about.request, about.get("inputs")
    if header is not None:
        shapes = {entry.name: (entry.dtype, entry.shape) for entry in header.entries}
        if not (isinstance(inputs, Mapping) and set(inputs) == {"tensors"}):
            return None, 1
        given: Any = about.places_key
        first = next((shape for name, (_, shape) in shapes.items() if name.startswith("inputs.")), ())
        samples = first[0] if first else 1
        rows: tuple[Any, ...] = tuple(
            (name, dtype, _per_sample(name, shape, samples)) for name, (dtype, shape) in shapes.items()
        )
    else:
        if not isinstance(inputs, list):
            return None, 1
        shape = list_shape(inputs)
        samples = shape[0] if shape else 1
        given = ()
        rows = ("list", shape[1:], *(_list_kind(request.get(name), samples) for name in DIRECTIONS))
    if any(row is None for row in rows) or request.get("training"):
        return None, samples
    return (about.model_key, about.request_key, given, rows), samples


def _per_sample(name: str, shape: tuple[int, ...], samples: int) -> Any:
    """A shape without the samples' axis where it leads; directions that do not lead with it must be equal."""
    leads = bool(shape) and shape[0] == samples
    return ("per sample", shape[1:]) if name.startswith("inputs.") or leads else ("all", shape)


def _list_kind(value: Any, samples: int) -> Any:
    if value is None:
        return ("none",)
    if not isinstance(value, list):
        return None
    shape = list_shape(value)
    return ("per sample", shape[1:]) if shape and shape[0] == samples else ("all", shape)


def list_shape(value: Any) -> tuple[int, ...]:
    """The shape of nested lists by their first entries; whether they are even is found out when they are read."""
    shape: list[int] = []
    while isinstance(value, list) and len(shape) < 32:
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return tuple(shape)
