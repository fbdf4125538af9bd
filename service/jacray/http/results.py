"""A stored result as a message: whole, one array of it, or the part of some samples, streamed as it is read."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jacray_workers.errors import Plain
from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.validation import nearest

from jacray.http.folders import JobFolder
from jacray.http.messages import RECEIPT
from jacray.http.problems import HttpError
from jacray.http.wire import ITEM, write_header
from jacray.store import Store, as_numpy, open_store, read_block
from jacray.target import Target

PIECE = 1 << 22
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which part of a result is wanted.

    Attributes:
        results: names of results; all where empty.
        array: the key of one array, or None.
        start, stop: samples; all where `stop` is None.
    """

    results: tuple[str, ...] = ()
    array: str | None = None
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Part:
    """One tensor of the message: a node, and which of its rows."""

    name: str
    node: Any
    dtype: str
    shape: tuple[int, ...]
    axis: int
    start: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * ITEM[self.dtype]


@dataclass(frozen=True)
class Stored:
    """A message over a stored result that has not been read yet.

    Attributes:
        header: what comes before the tensors.
        parts: the tensors in order.
        receipt: the receipt's bytes, which come last.
    """

    header: bytes
    parts: tuple[_Part, ...]
    receipt: bytes

    @property
    def size(self) -> int:
        """How many bytes the whole message has."""
        return len(self.header) + sum(part.size for part in self.parts) + len(self.receipt)

    @property
    def tag(self) -> str:
        """What tells this message from others of its job, whose numbers never change."""
        return f'"{hashlib.sha256(self.header + self.receipt).hexdigest()[:32]}"'

    def digest(self) -> str:
        """The sha256 of the whole message, as RFC 9530 writes it; all of it is read."""
        hasher = hashlib.sha256()
        for piece in self.pieces(0, self.size):
            hasher.update(piece)
        return f"sha-256=:{base64.b64encode(hasher.digest()).decode()}:"

    def pieces(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """Some bytes of the message in pieces of some megabytes; each is read when it is asked for."""
        at = 0
        for size, read in self._segments():
            low, high = max(start - at, 0), min(stop - at, size)
            if low < high:
                yield from read(low, high)
            at += size

    def _segments(self) -> Iterator[tuple[int, Callable[[int, int], Iterable[bytes | memoryview]]]]:
        yield len(self.header), lambda low, high: [self.header[low:high]]
        for part in self.parts:
            yield part.size, functools.partial(_read, part)
        yield len(self.receipt), lambda low, high: [self.receipt[low:high]]


_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?")


def find_span(headers: Mapping[str, str], stored: Stored) -> range | None:
    """The bytes that a request's `Range` asks for; None for all, also where it is meant for another message.

    Raises:
        HttpError: the message is shorter.
    """
    found = _RANGE.fullmatch(headers.get("range", "").strip())
    if found is None or headers.get("if-range", stored.tag) != stored.tag:
        return None
    first, last = int(found[1]), int(found[2]) if found[2] else stored.size - 1
    if last < first and found[2]:
        return None
    if first >= stored.size:
        shown = {"Content-Range": f"bytes */{stored.size}"}
        raise HttpError(416, "Range", f"must begin within the {stored.size} bytes", Plain(str(first)), "", shown)
    return range(first, min(last + 1, stored.size))


def open_result(folder: JobFolder, choice: Choice) -> Stored:
    """A stored result, or the part of it that was chosen.

    Raises:
        HttpError: there is no such array, or no such samples.
    """
    store = open_store(Target(str(folder.path.absolute())))
    arrays = _chosen(store.plan, store.structure, choice)
    start, stop = _range(store.plan, choice)
    parts, blocks = list[_Part](), dict[str, Any]()
    for array in arrays:
        if array.factored:
            parts += _factors(store, array, start, stop, blocks)
        else:
            parts.append(_dense(store, array, start, stop))
    # Wide numbers first, so that every tensor starts at a multiple of its own width.
    parts.sort(key=lambda part: -ITEM[part.dtype])
    names = {array.name for array in arrays}
    whole = choice.array is None
    structure = {name: tree for name, tree in store.structure.items() if name in names} if whole else {}
    about = {"results": structure, "blocks": blocks, "start": start, "stop": stop, "samples": store.plan.samples}
    receipt = folder.receipt.read_bytes() if whole else b""
    rows = [(part.name, part.dtype, part.shape) for part in parts]
    if receipt:
        rows.append((RECEIPT, "U8", (len(receipt),)))
    return Stored(write_header(about, rows), tuple(parts), receipt)


def _chosen(plan: Plan, structure: Mapping[str, Any], choice: Choice) -> Sequence[ArrayPlan]:
    if choice.array is not None:
        found = [array for array in plan.arrays if array.key == choice.array]
        if not found:
            keys = [array.key for array in plan.arrays]
            raise HttpError(404, "array", "names no array of this result", choice.array, nearest(choice.array, keys))
        return found
    for name in choice.results:
        if name not in structure:
            raise HttpError(404, "result", "was not asked for by this job", name, nearest(name, structure))
    return [array for array in plan.arrays if not choice.results or array.name in choice.results]


def _range(plan: Plan, choice: Choice) -> tuple[int, int]:
    stop = plan.samples if choice.stop is None else choice.stop
    if not 0 <= choice.start < stop <= plan.samples:
        shown = Plain(f"{choice.start} to {stop}")
        raise HttpError(422, "start", f"and stop must lie within the {plan.samples} samples, start before stop", shown)
    return choice.start, stop


def _dense(store: Store, array: ArrayPlan, start: int, stop: int) -> _Part:
    shape = list(array.shape)
    if array.axis >= 0:
        shape[array.axis] = stop - start
    first = start if array.axis >= 0 else 0
    return _Part(array.key, store.node(array.key), _NAMES[array.dtype], tuple(shape), array.axis, first)


def _factors(store: Store, array: ArrayPlan, start: int, stop: int, blocks: dict[str, Any]) -> list[_Part]:
    """The factors of these samples; they lie in the store shard by shard, and are far smaller than their block."""
    block: Any = read_block(store, array, start, stop)
    blocks[array.key] = block.meta()
    found = [(f"{array.key}/{name}", as_numpy(part)) for name, part in block.factors().items()]
    return [_Part(name, part, _NAMES[str(part.dtype)], part.shape, 0, 0) for name, part in found]


def _read(part: _Part, low: int, high: int) -> Iterator[memoryview]:
    """The bytes `low` to `high` of a part, read in rows along its first axis, some megabytes at a time."""
    if not part.shape:
        yield _bytes(part.node[...])[low:high]
        return
    inner: list[slice] = [slice(None)] * len(part.shape)
    if part.axis > 0:
        inner[part.axis] = slice(part.start, part.start + part.shape[part.axis])
    offset = part.start if part.axis == 0 else 0
    row = part.size // part.shape[0]
    step = max(PIECE // row, 1)
    for first in range(low // row, -(-high // row), step):
        last = min(first + step, part.shape[0])
        rows = _bytes(part.node[(slice(offset + first, offset + last), *inner[1:])])
        rows = rows[max(low - first * row, 0) : high - first * row]
        for at in range(0, len(rows), PIECE):
            yield rows[at : at + PIECE]


def _bytes(values: Any) -> memoryview:
    array = np.ascontiguousarray(values)
    return array.reshape(-1).view(np.uint8).data.cast("B") if array.size else memoryview(b"")
