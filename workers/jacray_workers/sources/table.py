"""Tables of numbers in text files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import unreadable
from jacray_workers.sources.made import check_memory
from jacray_workers.sources.specs import Csv
from jacray_workers.spec_parts import find
from jacray_workers.validation import nearest


def csv_table(spec: Csv, base: Path, argument: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The columns as float32 `(N, columns)`, and the fields; whole-numbered fields stay whole."""
    path = find(spec.path, base, f"{argument}.path", InputError)
    check_memory(path.stat().st_size * 8, f"{argument}.path")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=spec.delimiter)
            header = [name.strip() for name in next(reader, [])]
            rows = [_numbers(row, header, reader.line_num, f"{argument}.path") for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(argument, "csv file", path, error) from None
    if not rows:
        raise InputError(f"{argument}.path", "must hold a header line and at least one row", Plain(path.name))
    table = np.array(rows, dtype=np.float64)
    columns = spec.columns or [name for name in header if name not in spec.fields.values()]
    inputs = torch.from_numpy(table[:, [_column(c, header, f"{argument}.columns") for c in columns]].astype(np.float32))
    fields = {name: table[:, _column(c, header, f"{argument}.fields.{name}")] for name, c in spec.fields.items()}
    return inputs, {name: torch.from_numpy(_whole(values)) for name, values in fields.items()}


def _numbers(row: list[str], header: list[str], line: int, argument: str) -> list[float]:
    if len(row) != len(header):
        raise InputError(argument, f"must have {len(header)} columns in every row", Plain(f"{len(row)} in line {line}"))
    try:
        return [float(cell) for cell in row]
    except ValueError as error:
        raise InputError(argument, f"must hold numbers only: {error}", Plain(f"line {line}")) from None


def _column(name: str, header: list[str], argument: str) -> int:
    if name not in header:
        raise InputError(argument, "names no column of the table", name, nearest(name, header))
    return header.index(name)


def _whole(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, Any]:
    return values.astype(np.int64) if bool((values == np.round(values)).all()) else values.astype(np.float32)
