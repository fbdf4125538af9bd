"""Files that hold arrays by name: which are inputs and which are fields, and rows of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Part, picked, stamped
from jacray_workers.sources.places import Place, Stamp


class Array(Protocol):
    """One array of a file, not read. Picklable."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from start to stop."""


@dataclass(frozen=True)
class Arrays:
    """A reader of arrays that lie in one file.

    Attributes:
        inputs: by the name that each gets.
        fields: likewise.
    """

    samples: int
    argument: str
    places: tuple[tuple[Place, Stamp], ...]
    inputs: Mapping[str, Array]
    fields: Mapping[str, Array]

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The rows of every input and field."""
        inputs: dict[str, Part] = {name: array.read(start, stop) for name, array in self.inputs.items()}
        return inputs, self.read_fields(start, stop)

    def read_fields(self, start: int, stop: int) -> dict[str, Tensor]:
        """The rows of every field."""
        return {name: array.read(start, stop) for name, array in self.fields.items()}


def arrays_of(spec: Any, place: Place, known: Mapping[str, Callable[[], Array]], argument: str) -> Arrays:
    """The reader of those arrays that a spec picks.

    Args:
        spec: has `arrays` and `fields`.
        place: the file.
        known: opens each array of the file, by name.
        argument: what the spec is called in errors.

    Raises:
        InputError: a name is not in the file, or the arrays have different numbers of rows.
    """
    names = picked(spec.arrays, spec.fields, list(known), argument)
    inputs = {as_: known[name]() for as_, name in names.items()}
    fields = {as_: known[name]() for as_, name in spec.fields.items()}
    return Arrays(same_rows(inputs, fields, argument), argument, stamped(place), inputs, fields)


def same_rows(inputs: Mapping[str, Array], fields: Mapping[str, Array], argument: str) -> int:
    """The number of rows that all arrays share.

    Raises:
        InputError: an array has no axes, there are no rows, or the numbers differ.
    """
    for name, array in [*inputs.items(), *fields.items()]:
        if not array.shape:
            shown = Plain(f"{name or 'an array'} without axes")
            raise InputError(f"{argument}.path", "must have the batch as its first axis", shown)
    sizes = {name: array.shape[0] for name, array in inputs.items()}
    if len(set(sizes.values())) > 1:
        shown = Plain(", ".join(f"{name}: {n}" for name, n in sizes.items()))
        raise InputError(argument, "must have the same batch size in every leaf", shown)
    samples = next(iter(sizes.values()))
    for name, array in fields.items():
        if array.shape[0] != samples:
            shown = Plain(f"shape {tuple(array.shape)}")
            raise InputError(f"{argument}.fields.{name}", f"must have a row for each of the {samples} samples", shown)
    if samples == 0:
        raise InputError(
            argument, "must hold at least one sample", Plain(f"shape {tuple(next(iter(inputs.values())).shape)}")
        )
    return samples
