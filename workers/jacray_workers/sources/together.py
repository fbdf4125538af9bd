"""Several sources side by side, each giving named inputs of the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Part
from jacray_workers.sources.places import Place, Stamp

if TYPE_CHECKING:
    from jacray_workers.sources.ranged import Rows


class Together:
    """A reader of sources that stand under names in a spec.

    A source of one tensor gives the input of its name; one of several (token ids and their mask) gives these under
    their own names. Fields go together.

    Args:
        parts: the sources by name.
        argument: what the spec is called in errors.

    Raises:
        InputError: they have different numbers of samples, or two give an input or a field of one name.
    """

    def __init__(self, parts: Mapping[str, Rows], argument: str) -> None:
        self.parts, self.argument = dict(parts), argument
        sizes = {name: part.samples for name, part in parts.items()}
        if len(set(sizes.values())) > 1:
            shown = Plain(", ".join(f"{name}: {n}" for name, n in sizes.items()))
            raise InputError(argument, "must have the same batch size in every leaf", shown)
        self.samples = next(iter(sizes.values()))
        self.places: tuple[tuple[Place, Stamp], ...] = tuple(p for part in parts.values() for p in part.reader.places)
        _distinct([_given(name, leaf) for name, part in parts.items() for leaf in part.inputs], argument)
        _distinct([field for part in parts.values() for field in part.fields], f"{argument}.fields")

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The inputs and fields of every source."""
        inputs: dict[str, Part] = {}
        fields: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            found = part.read(start, stop)
            inputs |= {_given(name, leaf): tensor for leaf, tensor in found.named.items()}
            fields |= found.fields
        return inputs, fields

    def read_fields(self, start: int, stop: int) -> dict[str, Tensor]:
        """The fields of every source that has some."""
        with_fields = [part for part in self.parts.values() if part.fields]
        return {name: field for part in with_fields for name, field in part.read_fields(start, stop).items()}


def _given(name: str, leaf: str) -> str:
    return leaf or name


def _distinct(names: list[Any], argument: str) -> None:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(argument, "must come from one source each", twice)
