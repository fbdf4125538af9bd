"""Tables of numbers or texts in text files, read by range from an index of places that the first reading makes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Part, check_memory, stamped
from jacray_workers.sources.columns import Choice, choose
from jacray_workers.sources.places import Place, Reach, Stamp, locate, unreadable
from jacray_workers.sources.specs import Csv

MAX_LINE = 1 << 22
MAX_COLUMNS = 100_000
_EVERY = 1024  # rows between two places in the index
_NUMBER = re.compile(
    r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*|\s*[-+]?(nan|inf|infinity)\s*", re.ASCII | re.IGNORECASE
)
_WHOLE = re.compile(r"\s*[-+]?\d+\s*", re.ASCII)


@dataclass(frozen=True)
class Table:
    """A reader of a csv file.

    Attributes:
        place: the file.
        header: the columns' names.
        delimiter: what stands between cells.
        choice: which columns become what.
        numeric: for each column that is read, whether it holds numbers.
        whole: for each field, whether all its numbers are whole.
        index: where every 1,024th row begins.
        dtype: of columns of numbers.
    """

    samples: int
    argument: str
    places: tuple[tuple[Place, Stamp], ...]
    place: Place
    header: tuple[str, ...]
    delimiter: str
    choice: Choice
    texts: frozenset[str]
    whole: frozenset[str]
    index: tuple[int, ...]
    dtype: str

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The rows from start to stop."""
        check_memory((stop - start) * len(self.choice.names) * 64, f"{self.argument}.path")
        cells: dict[str, list[Any]] = {name: [] for name in self.choice.names}
        places = {name: self.header.index(name) for name in cells}
        with self.place.open() as stream:
            stream.seek(self.index[start // _EVERY])
            rows = _rows(stream, self.delimiter, self.place)
            for number, (row, _) in enumerate(rows, start // _EVERY * _EVERY):
                if number >= stop:
                    break
                if number >= start:
                    for name, place in places.items():
                        cells[name].append(self._cell(row[place], name))
        columns: dict[str, Part] = {name: self._column(name, values) for name, values in cells.items()}
        return self.choice.inputs(columns), {
            as_: self._field(columns[name], as_) for as_, name in self.choice.fields.items()
        }

    def _cell(self, text: str, name: str) -> Any:
        return text if name in self.texts else int(text) if name in self.whole else float(text)

    def _column(self, name: str, values: list[Any]) -> Part:
        if name in self.texts:
            return values
        if name in self.whole and name in self.choice.fields.values():
            return torch.tensor(values, dtype=torch.int64)
        exact = torch.tensor(values, dtype=torch.float64)
        found = exact.to(getattr(torch, self.dtype))
        if bool((found.isinf() & ~exact.isinf()).any()):
            rule = f"must hold numbers that {self.dtype} can hold"
            raise InputError(
                f"{self.argument}.dtype",
                rule,
                Plain(f"{exact.abs().max().item()} in {name}"),
                "dtype: float64 holds more",
            )
        return found

    def _field(self, values: Part, as_: str) -> Tensor:
        if not isinstance(values, Tensor):
            raise InputError(f"{self.argument}.fields.{as_}", "must name a column of numbers", Plain("texts"))
        return values


def csv_table(spec: Csv, base: Path, argument: str, reach: Reach) -> Table:
    """A csv file, looked through once: every row has every column, every cell of a column of numbers is one."""
    place = locate(spec.path, base, f"{argument}.path", reach=reach)
    stamps = stamped(place)
    header, first = _header(place, spec.delimiter)
    known = {name: _kind(cell) for name, cell in zip(header, first, strict=True)}
    choice = choose(spec.columns, spec.fields, known, argument)
    scan = _Scan(place, spec.delimiter, header, choice, frozenset(n for n in choice.names if known[n] == "text"))
    samples, index = scan.run()
    return Table(
        samples,
        argument,
        stamps,
        place,
        header,
        spec.delimiter,
        choice,
        scan.texts,
        frozenset(scan.whole),
        index,
        spec.dtype,
    )


def _kind(cell: str) -> str:
    return "number" if _NUMBER.fullmatch(cell) else "text"


def _header(place: Place, delimiter: str) -> tuple[tuple[str, ...], list[str]]:
    """The columns' names, and the first row."""
    with place.open() as stream:
        rows = _rows(stream, delimiter, place)
        header = tuple(name.strip() for name in next(rows, ([], 0))[0])
        first = next(rows, (None, 0))[0]
    if first is None or not header:
        raise InputError(place.argument, "must hold a header line and at least one row", Plain(place.name))
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if len(header) > MAX_COLUMNS or twice is not None:
        shown = f"{twice} twice" if twice is not None else f"{len(header):,} columns"
        raise InputError(place.argument, f"must have at most {MAX_COLUMNS:,} columns of distinct names", Plain(shown))
    _check_width(first, header, place, 2)
    return header, first


class _Scan:
    """One reading of a whole table that keeps only where rows begin, and which columns are whole numbers."""

    def __init__(
        self, place: Place, delimiter: str, header: tuple[str, ...], choice: Choice, texts: frozenset[str]
    ) -> None:
        self.place, self.delimiter, self.header = place, delimiter, header
        self.texts = texts
        self.columns = {name: header.index(name) for name in choice.names}
        self.whole = {name for name in choice.fields.values() if name not in texts}

    def run(self) -> tuple[int, tuple[int, ...]]:
        """The number of rows, and where every 1,024th begins."""
        index, number = [], -1
        with self.place.open() as stream:
            rows = _rows(stream, self.delimiter, self.place)
            begin = next(rows)[1]
            for number, (row, end) in enumerate(rows):
                if number % _EVERY == 0:
                    index.append(begin)
                self._check(row, number + 2)
                begin = end
        return number + 1, tuple(index)

    def _check(self, row: list[str], line: int) -> None:
        _check_width(row, self.header, self.place, line)
        for name, column in self.columns.items():
            cell = row[column]
            if name not in self.texts and not _NUMBER.fullmatch(cell):
                shown = Plain(f"{cell[:60]!r} in row {line}, column {name}")
                raise InputError(self.place.argument, "must hold numbers only in a column that starts with one", shown)
            if name in self.whole and not (_WHOLE.fullmatch(cell) and len(cell) < 19):
                self._not_whole(name, cell, line)

    def _not_whole(self, name: str, cell: str, line: int) -> None:
        if _WHOLE.fullmatch(cell) and not -(2**63) <= int(cell[:400]) < 2**63:
            shown = Plain(f"{cell[:60]} in row {line}, column {name}")
            raise InputError(self.place.argument, "must hold whole numbers of at most 64 bits", shown)
        if not _WHOLE.fullmatch(cell):
            self.whole.discard(name)


def _check_width(row: list[str], header: tuple[str, ...], place: Place, line: int) -> None:
    if len(row) != len(header):
        shown = Plain(f"{len(row)} in row {line}")
        raise InputError(place.argument, f"must have {len(header)} columns in every row", shown)


def _rows(stream: BinaryIO, delimiter: str, place: Place) -> Iterator[tuple[list[str], int]]:
    """Each row's cells, and where the next row begins. Empty lines are passed over."""
    lines = _Lines(stream)
    try:
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            if row:
                yield row, lines.place
    except (ValueError, csv.Error, OSError) as error:
        raise unreadable(place, "csv file", error) from None


class _Lines:
    """A stream's lines as text, none longer than a line of a table may be."""

    def __init__(self, stream: BinaryIO) -> None:
        # fsspec's files read lines of any length only.
        self.stream: Any = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(cast("Any", stream))
        self.place = self.stream.tell()

    def __iter__(self) -> Iterator[str]:
        while line := self.stream.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"a line is longer than {MAX_LINE:,} bytes")
            if b"\0" in line:
                raise ValueError("it holds a NUL byte")
            begins, self.place = self.place == 0, self.place + len(line)
            yield line.decode("utf-8-sig" if begins else "utf-8")
