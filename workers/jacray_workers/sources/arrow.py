"""Tables that Arrow reads: parquet files, and folders that Hugging Face's `datasets` wrote; by range."""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain, UserError
from jacray_workers.sources.arrays import Part, check_memory, from_numpy
from jacray_workers.sources.columns import Choice, choose
from jacray_workers.sources.places import Place, Reach, Stamp, listed, locate, unreadable
from jacray_workers.sources.specs import Datasets, Parquet

MAX_STATE = 1 << 22
_BATCH = 4096
_FILE = re.compile(r"[\w.-]+\.arrow")


@dataclass(frozen=True)
class File:
    """One file of a table.

    Attributes:
        place: where.
        format: `parquet`, or `arrow` for Arrow's stream format.
        starts: the first row of each row group or record batch, and after the last one the number of rows.
    """

    place: Place
    format: str
    starts: tuple[int, ...]

    def batches(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Any]:
        """Record batches that hold exactly the rows from start to stop."""
        first = bisect.bisect_right(self.starts, start) - 1
        last = bisect.bisect_left(self.starts, stop)
        at = self.starts[first]
        with _reading(self.place):
            for batch in _BATCHES[self.format](self.place, first, last, list(columns)):
                low, high = max(start - at, 0), min(stop - at, batch.num_rows)
                if low < high:
                    yield batch.slice(low, high - low)
                at += batch.num_rows


@dataclass(frozen=True)
class ArrowTable:
    """A reader of one table in one or several files.

    Attributes:
        files: in order.
        starts: the first row of each file, and the number of rows.
        choice: which columns become what.
        pictures: for columns of images, how they are decoded.
    """

    samples: int
    argument: str
    places: tuple[tuple[Place, Stamp], ...]
    files: tuple[File, ...]
    starts: tuple[int, ...]
    choice: Choice
    pictures: Any = None

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The rows from start to stop."""
        columns = self._columns(start, stop, self.choice.names)
        fields = {as_: self._field(columns[name], as_) for as_, name in self.choice.fields.items()}
        return self.choice.inputs(columns), fields

    def read_fields(self, start: int, stop: int) -> dict[str, Tensor]:
        """The fields' rows from start to stop."""
        columns = self._columns(start, stop, sorted(set(self.choice.fields.values())))
        return {as_: self._field(columns[name], as_) for as_, name in self.choice.fields.items()}

    def _columns(self, start: int, stop: int, names: Sequence[str]) -> dict[str, Part]:
        found: dict[str, list[Part]] = {name: [] for name in names}
        for batch in self.batches(start, stop, names):
            for name, parts in found.items():
                parts.append(self._part(batch.column(name), name))
        if not all(found.values()):
            raise InputError(
                f"{self.argument}.path", "must hold the rows that it promises", Plain(self.files[0].place.name)
            )
        return {name: _joined(parts, f"{self.argument}.columns") for name, parts in found.items()}

    def batches(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Any]:
        """Record batches that hold exactly the rows from start to stop, over all files."""
        for file, first, last in zip(self.files, self.starts, self.starts[1:], strict=False):
            low, high = max(start, first) - first, min(stop, last) - first
            if low < high:
                yield from file.batches(low, high, columns)

    def _part(self, column: Any, name: str) -> Part:
        if self.pictures is not None and _is_picture(column.type):
            return _pictures(column, self.pictures, self.argument)
        with _reading(self.files[0].place):
            return _values(column, f"{self.argument}.columns", name)

    def _field(self, values: Part, as_: str) -> Tensor:
        if not isinstance(values, Tensor):
            raise InputError(f"{self.argument}.fields.{as_}", "must name a column of numbers", Plain("texts"))
        return values


def parquet(spec: Parquet, base: Path, argument: str, reach: Reach) -> ArrowTable:
    """A parquet file, or the parquet files of a folder in the order of their names."""
    place = locate(spec.path, base, f"{argument}.path", reach=reach)
    found = [place]
    if place.folder:
        found = [place.inside(name) for name in listed(place) if name.endswith(".parquet")]
    if not found:
        raise InputError(place.argument, "must hold at least one parquet file", Plain(place.name))
    files = [File(p, "parquet", _parquet_starts(p)) for p in found]
    return _table(spec, files, argument, None)


def datasets(spec: Datasets, base: Path, argument: str, reach: Reach) -> ArrowTable:
    """A folder that `save_to_disk` wrote."""
    place = locate(spec.path, base, f"{argument}.path", reach=reach)
    if not place.folder:
        raise InputError(place.argument, "must be a folder that `datasets` wrote with save_to_disk", Plain(place.name))
    folder = _split(place, spec, argument)
    state = _json(folder.inside("state.json"))
    entries = state.get("_data_files") if isinstance(state, Mapping) else None
    names = (
        [e.get("filename") if isinstance(e, Mapping) else None for e in entries] if isinstance(entries, list) else []
    )
    if not names or any(not isinstance(n, str) or not _FILE.fullmatch(n) for n in names):
        rule = "must be a dataset whose state.json lists its .arrow files by plain names"
        raise InputError(place.argument, rule, str(names)[:100])
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(
            place.argument, "must be saved with its indices flattened", Plain(place.name), "flatten_indices()"
        )
    files = []
    for name in names:
        part = locate(folder.inside(str(name)).path, base, f"{argument}.path", reach=reach)
        files.append(File(part, "arrow", _arrow_starts(part)))
    return _table(spec, files, argument, spec)


def _table(spec: Any, files: list[File], argument: str, pictures: Any) -> ArrowTable:
    """The reader of a table's files; columns of lists of any length are looked through, that all lists have one."""
    schema = _schema(files[0])
    for file in files[1:]:
        if not _schema(file).equals(schema):
            raise InputError(f"{argument}.path", "must hold files of one schema", Plain(file.place.name))
    kinds = {field.name: _kind(field.type) for field in schema}
    if len(kinds) != len(schema):
        raise InputError(f"{argument}.path", "must have columns of distinct names", Plain(files[0].place.name))
    choice = choose(spec.columns, spec.fields, kinds, argument)
    starts = [0]
    for file in files:
        starts.append(starts[-1] + file.starts[-1])
    if starts[-1] == 0:
        raise InputError(argument, "must hold at least one sample", Plain("a table without rows"))
    places = tuple((file.place, file.place.stamp()) for file in files)
    table = ArrowTable(starts[-1], argument, places, tuple(files), tuple(starts), choice, pictures)
    for name in choice.names:
        _check_column(table, name, schema.field(name).type, spec.range)
    return table


def _check_column(table: ArrowTable, name: str, kind: Any, range_: tuple[int, int] | None) -> None:
    """Refuse a column that is no tensor: of strange values, or of lists of several lengths."""
    arrow = _arrow()
    where = f"{table.argument}.columns"
    inner, ragged = _storage(kind), False
    while arrow.types.is_list(inner) or arrow.types.is_large_list(inner) or arrow.types.is_fixed_size_list(inner):
        ragged |= not arrow.types.is_fixed_size_list(inner)
        inner = _storage(inner.value_type)
    texts = (arrow.types.is_string(inner) or arrow.types.is_large_string(inner)) and inner == _storage(kind)
    picture = table.pictures is not None and _is_picture(kind)
    numbers = arrow.types.is_integer(inner) or arrow.types.is_floating(inner) or arrow.types.is_boolean(inner)
    if not (texts or picture or numbers):
        raise InputError(
            where, "must be columns of numbers, texts, or lists of numbers", Plain(f"{name}: {str(kind)[:80]}")
        )
    if ragged:
        start, stop = range_ or (0, table.samples)
        lengths: tuple[int, ...] | None = None
        for batch in table.batches(start, min(stop, table.samples), [name]):
            found = _sizes(batch.column(0), where, name)
            if lengths not in (None, found):
                shown = Plain(f"{name} with {list(lengths or ())} and {list(found)}")
                raise InputError(where, "must hold lists of one length", shown)
            lengths = found


def _sizes(column: Any, where: str, name: str) -> tuple[int, ...]:
    """The lengths of nested lists in a column.

    Raises:
        InputError: they differ, or some value is missing.
    """
    arrow, sizes = _arrow(), []
    while True:
        column = column.storage if isinstance(column, arrow.ExtensionArray) else column
        if column.null_count:
            raise InputError(where, "must hold a value in every row", Plain(f"{column.null_count:,} missing in {name}"))
        if arrow.types.is_fixed_size_list(column.type):
            sizes.append(column.type.list_size)
        elif arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type):
            lengths = np.diff(column.offsets.to_numpy())
            if len(lengths) and lengths.min() != lengths.max():
                shown = Plain(f"{name} with {lengths.min()} to {lengths.max()}")
                raise InputError(where, "must hold lists of one length", shown)
            sizes.append(int(lengths[0]) if len(lengths) else 0)
        else:
            return tuple(sizes)
        column = column.flatten()


def _values(column: Any, where: str, name: str) -> Part:
    """A column's rows as a tensor `(rows, *sizes)`, or as texts."""
    arrow, rows = _arrow(), len(column)
    sizes = _sizes(column, where, name)
    while True:
        column = column.storage if isinstance(column, arrow.ExtensionArray) else column
        if not isinstance(column, arrow.ListArray | arrow.LargeListArray | arrow.FixedSizeListArray):
            break
        column = column.flatten()
    if column.null_count:
        raise InputError(where, "must hold a value in every row", Plain(f"{column.null_count:,} missing in {name}"))
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        texts: list[str] = column.to_pylist()
        return texts
    check_memory(column.nbytes, where)
    return from_numpy(column.to_numpy(zero_copy_only=False), where).reshape(rows, *sizes)


def _joined(parts: list[Part], where: str) -> Part:
    if isinstance(parts[0], Tensor):
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len({part.shape[1:] for part in tensors}) > 1:
            raise InputError(
                where, "must hold lists of one length", Plain(str([list(p.shape[1:]) for p in tensors])[:80])
            )
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return [text for part in parts for text in part]


def _pictures(column: Any, spec: Datasets, argument: str) -> Tensor:
    from jacray_workers.sources.images import decoded

    rows = column.to_pylist()
    if any(not row or not row.get("bytes") for row in rows):
        raise InputError(f"{argument}.columns", "must hold images, not paths to images", None, "save them embedded")
    return torch.stack([decoded(row["bytes"], spec.mode, spec.size, f"{argument}.columns", "an image") for row in rows])


def _kind(kind: Any) -> str:
    types = _arrow().types
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return "number"
    return "text" if types.is_string(kind) or types.is_large_string(kind) else "array"


def _storage(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, _arrow().BaseExtensionType) else kind


def _is_picture(kind: Any) -> bool:
    arrow = _arrow()
    return bool(arrow.types.is_struct(kind)) and {field.name for field in kind} == {"bytes", "path"}


def _split(place: Place, spec: Datasets, argument: str) -> Place:
    """The folder of one split, where there are several."""
    names = listed(place)
    if "dataset_dict.json" not in names:
        return place
    splits = _json(place.inside("dataset_dict.json")).get("splits")
    known = (
        [s for s in splits if isinstance(s, str) and re.fullmatch(r"\w+([.-]\w+)*", s)]
        if isinstance(splits, list)
        else []
    )
    if spec.split not in known:
        raise InputError(f"{argument}.split", f"must be one of {', '.join(known)}", spec.split)
    return place.inside(str(spec.split), folder=True)


def _json(place: Place) -> Any:
    """A small file of JSON."""
    try:
        with place.open() as stream:
            text = stream.read(MAX_STATE + 1)
        if len(text) > MAX_STATE:
            raise ValueError(f"{place.name} is larger than {MAX_STATE:,} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"{place.name} is no mapping")
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(place, "file of JSON", error) from None
    return found


def _schema(file: File) -> Any:
    with _reading(file.place):
        if file.format == "parquet":
            with _parquet_file(file.place) as opened:
                return opened.schema_arrow
        with _arrow_stream(file.place) as opened:
            return opened.schema


def _parquet_starts(place: Place) -> tuple[int, ...]:
    starts = [0]
    with _reading(place), _parquet_file(place) as opened:
        meta = opened.metadata
        for group in range(meta.num_row_groups):
            rows = meta.row_group(group).num_rows
            if not 0 <= rows < 2**48:
                raise ValueError(f"a row group of {rows} rows")
            starts.append(starts[-1] + rows)
        if starts[-1] != meta.num_rows:
            raise ValueError(f"{meta.num_rows} rows in all, {starts[-1]} in its row groups")
    return tuple(starts)


def _parquet_batches(place: Place, first: int, last: int, columns: list[str]) -> Iterator[Any]:
    with _parquet_file(place) as opened:
        # Without threads: Arrow's pool would compete with torch's, and outlive the reading.
        batches = opened.iter_batches(_BATCH, list(range(first, last)), columns, use_threads=False)
        yield from batches


def _arrow_starts(place: Place) -> tuple[int, ...]:
    starts = [0]
    with _reading(place), _arrow_stream(place) as opened:
        for batch in opened:
            starts.append(starts[-1] + batch.num_rows)
    return tuple(starts)


def _arrow_batches(place: Place, first: int, last: int, columns: list[str]) -> Iterator[Any]:
    with _arrow_stream(place) as opened:
        for number, batch in enumerate(opened):
            if number >= last:
                return
            # A batch that is passed over costs nothing: its numbers stay in the mapped file.
            if number >= first:
                batch.validate(full=True)
                yield batch.select(columns)


_BATCHES = {"parquet": _parquet_batches, "arrow": _arrow_batches}


@functools.cache
def _arrow() -> Any:
    try:
        import pyarrow as pa
        from pyarrow import ipc as _ipc  # noqa: F401 - both are attributes of the package once imported
        from pyarrow import parquet as _parquet  # noqa: F401
    except ImportError:
        raise InputError("inputs.kind", "needs the package pyarrow", None, "pip install 'jacray[data]'") from None
    return pa


@contextlib.contextmanager
def _parquet_file(place: Place) -> Iterator[Any]:
    arrow = _arrow()
    source = arrow.memory_map(place.path) if place.local else place.open()
    limits: dict[str, Any] = {"thrift_string_size_limit": 1 << 26, "thrift_container_size_limit": 1 << 22}
    limits |= {"pre_buffer": False, "page_checksum_verification": True}
    with source, arrow.parquet.ParquetFile(source, **limits) as opened:
        yield opened


@contextlib.contextmanager
def _arrow_stream(place: Place) -> Iterator[Any]:
    arrow = _arrow()
    source = arrow.memory_map(place.path) if place.local else arrow.PythonFile(place.open(), "r")
    with source, arrow.ipc.open_stream(source) as opened:
        yield opened


@contextlib.contextmanager
def _reading(place: Place) -> Iterator[None]:
    """Whatever Arrow says of a file becomes an error of ours."""
    arrow = _arrow()
    try:
        yield
    except (arrow.ArrowException, ValueError, OSError, MemoryError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(place, "table", error) from None
