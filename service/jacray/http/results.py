"""A stored result as a message: whole, one array of it, or the part of some samples, streamed as it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The message in pieces of some megabytes; each is read when it is asked for."""
        yield self.header
        for part in self.parts:
            yield from _read(part)
        if self.receipt:
            yield self.receipt


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


def _read(part: _Part) -> Iterator[memoryview]:
    """The rows of a part along its first axis, some megabytes at a time."""
    if not part.shape:
        yield _bytes(part.node[...])
        return
    inner: list[slice] = [slice(None)] * len(part.shape)
    if part.axis > 0:
        inner[part.axis] = slice(part.start, part.start + part.shape[part.axis])
    offset = part.start if part.axis == 0 else 0
    step = max(PIECE // max(part.size // max(part.shape[0], 1), 1), 1)
    for low in range(0, part.shape[0], step):
        high = min(low + step, part.shape[0])
        rows = _bytes(part.node[(slice(offset + low, offset + high), *inner[1:])])
        for at in range(0, len(rows), PIECE):
            yield rows[at : at + PIECE]


def _bytes(values: Any) -> memoryview:
    array = np.ascontiguousarray(values)
    return array.reshape(-1).view(np.uint8).data.cast("B") if array.size else memoryview(b"")
