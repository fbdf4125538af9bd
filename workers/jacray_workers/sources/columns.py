"""Which columns of a table become which inputs and fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Part
from jacray_workers.validation import nearest


@dataclass(frozen=True)
class Choice:
    """Columns by what they become.

    Attributes:
        parts: of each input, one column as it is, or several that are put side by side.
        fields: of each field, its column.
    """

    parts: Mapping[str, str | tuple[str, ...]]
    fields: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read, once."""
        chosen = [n for part in self.parts.values() for n in ((part,) if isinstance(part, str) else part)]
        return tuple(dict.fromkeys([*chosen, *self.fields.values()]))

    def inputs(self, columns: Mapping[str, Part]) -> dict[str, Part]:
        """The inputs that some rows of the columns make."""
        return {
            name: columns[part] if isinstance(part, str) else _stacked([columns[n] for n in part])
            for name, part in self.parts.items()
        }


def choose(columns: Any, fields: Mapping[str, str], kinds: Mapping[str, str], argument: str) -> Choice:
    """What a spec's `columns` and `fields` mean for a table.

    Args:
        columns: a name, several, a mapping from input names to either, or None for all that are no fields.
        fields: from names to columns.
        kinds: of each column of the table: `number` for one number a row, `text`, `array` for anything else.
        argument: what the spec is called in errors.

    Raises:
        InputError: a column is not in the table, or several are no numbers and cannot stand side by side.
    """
    for as_, name in fields.items():
        _known(name, kinds, f"{argument}.fields.{as_}")
    if columns is None:
        columns = _all(fields, kinds, argument)
    parts = dict(columns) if isinstance(columns, Mapping) else {"": columns}
    for part in parts.values():
        for name in (part,) if isinstance(part, str) else part:
            _known(name, kinds, f"{argument}.columns")
            if not isinstance(part, str) and kinds[name] != "number":
                shown = Plain(f"{name} with a {kinds[name]} in each row")
                way_out = f"take it alone, as in columns: {name}, or as a named input"
                raise InputError(
                    f"{argument}.columns", "must hold one number a row to be put side by side", shown, way_out
                )
    return Choice(parts, dict(fields))


def _all(fields: Mapping[str, str], kinds: Mapping[str, str], argument: str) -> str | tuple[str, ...]:
    free = [name for name in kinds if name not in fields.values()]
    if not free:
        raise InputError(f"{argument}.columns", "must leave at least one column that is no field", None)
    return free[0] if len(free) == 1 and kinds[free[0]] != "number" else tuple(free)


def _known(name: str, kinds: Mapping[str, str], argument: str) -> None:
    if name not in kinds:
        raise InputError(argument, "names no column of the table", name, nearest(name, kinds))


def _stacked(columns: list[Any]) -> Tensor:
    dtype = reduce(torch.promote_types, [column.dtype for column in columns])
    return torch.stack([column.to(dtype) for column in columns], dim=1)
