"""Tensors on the wire: safetensors, that is a length, a JSON header with types, shapes and places, then raw bytes.

What a message says besides its tensors stands as one JSON text in the header's metadata. Nothing here needs torch, and
nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jacray_workers.errors import InputError, Plain

MEDIA = "application/x-safetensors"
PREFIX = 8
MAX_HEADER = 4 << 20
MAX_DEPTH = 128
ITEM = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1
}  # fmt: skip
"""Bytes of one number by safetensors' name of its type."""
_KEY = "jacray"
_MAX_AXES = 32
_SMALL = 1 << 14
_DIRECTIONS = ("weights", "vectors")
_TEXT = re.compile(r'"(?:[^"\\]+|\\.)*"')
_OTHER = re.compile(r"[^\[\]{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


class WireError(InputError):
    """A body that is not what its media type says."""

    http_status = 400


@dataclass(frozen=True)
class Entry:
    """One tensor of a message.

    Attributes:
        name: what it is called.
        dtype: safetensors' name of its type.
        shape: its sizes.
        start, stop: its bytes, from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class About(dict[str, Any]):
    """A message besides its tensors. Nobody changes it: requests of one kind share it, and what is told from it."""

    @functools.cached_property
    def model_key(self) -> str:
        """What tells models apart."""
        return hashlib.sha256(dump(self.get("model")).encode()).hexdigest()

    @functools.cached_property
    def request_key(self) -> str:
        """What tells requests apart, the numbers that go with each sample aside."""
        return dump({name: part for name, part in self.request.items() if name not in _DIRECTIONS})

    @functools.cached_property
    def places_key(self) -> str:
        """Which tensors are what."""
        return dump([self.get("inputs"), *(self.request.get(name) for name in _DIRECTIONS)])

    @property
    def request(self) -> Mapping[str, Any]:
        """The request's fields."""
        return self.get("request") or {}


@dataclass(frozen=True)
class Header:
    """What stands before the bytes.

    Attributes:
        about: the message besides its tensors.
        entries: the tensors in the order of their bytes.
        size: how many bytes come before the first tensor's.
        text: the header itself, where it is small: what makes two messages alike in all but their numbers.
    """

    about: About
    entries: tuple[Entry, ...]
    size: int
    text: bytes | None = None

    @functools.cached_property
    def total(self) -> int:
        """How many bytes the whole message has."""
        return self.size + (self.entries[-1].stop if self.entries else 0)


def write_header(about: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes before the tensors.

    Args:
        about: the message besides its tensors, as JSON data.
        tensors: name, type and shape of each, in the order in which their bytes will follow.
    """
    found: dict[str, Any] = {"__metadata__": {_KEY: dump(about)}}
    at = 0
    for name, dtype, shape in tensors:
        stop = at + math.prod(shape) * ITEM[dtype]
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def dump(value: Any) -> str:
    """JSON without spaces; infinities and NaN must have become texts."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def header_size(prefix: bytes | memoryview) -> int:
    """How many bytes come before the tensors, from a message's first eight.

    Raises:
        WireError: the length is out of bounds.
    """
    if len(prefix) < PREFIX:
        raise WireError("body", "must be a safetensors file, which starts with 8 bytes", Plain(f"{len(prefix)} bytes"))
    (length,) = struct.unpack("<Q", bytes(prefix[:PREFIX]))
    if not 2 <= length <= MAX_HEADER:
        rule = f"must be a safetensors file with a header of 2 to {MAX_HEADER:,} bytes"
        raise WireError("body", rule, Plain(f"{length} bytes"))
    return int(PREFIX + length)


def read_header(data: bytes | memoryview) -> Header:
    """The header of a message, fully checked; `data` holds at least the header.

    Raises:
        WireError: it is not safetensors, or its tensors overlap, leave holes, or have another size than their shape.
    """
    size = header_size(data)
    if len(data) < size:
        raise WireError("body", f"must hold its header of {size} bytes", Plain(f"{len(data)} bytes"))
    text = bytes(data[PREFIX:size])
    return _read_known(text) if size < _SMALL else _read(text)


@functools.lru_cache(maxsize=128)
def _read_known(text: bytes) -> Header:
    """Messages of one kind have the same header, which is most of what there is to read in a small one."""
    return _read(text)


def _read(text: bytes) -> Header:
    found = load(text, "body")
    if not isinstance(found, dict):
        raise WireError("body", "must have a JSON object as its header", found)
    metadata = found.pop("__metadata__", {})
    entries = sorted((_entry(name, value) for name, value in found.items()), key=lambda e: (e.start, e.stop))
    at = 0
    for entry in entries:
        if entry.start != at:
            raise WireError(f"body.{entry.name}", f"must start at byte {at}, where the one before it ends", entry.start)
        at = entry.stop
    small = text if PREFIX + len(text) < _SMALL else None
    return Header(_about(metadata), tuple(entries), PREFIX + len(text), small)


def load(text: bytes | str, argument: str) -> Any:
    """JSON as strict readers see it: no NaN, no infinity, no number that would become one, no name twice.

    Raises:
        WireError: it is no JSON, or nests deeper than whoever passes it on could write it.
    """
    try:
        told = text if isinstance(text, str) else text.decode("utf-8")
        found = json.loads(told, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError:
        raise _too_deep(argument) from None
    except ValueError as error:
        raise WireError(argument, f"must be JSON: {error}") from None
    if told.count("[") + told.count("{") > MAX_DEPTH and _depth(told) > MAX_DEPTH:
        raise _too_deep(argument)
    return found


def _too_deep(argument: str) -> WireError:
    return WireError(argument, f"must nest at most {MAX_DEPTH} lists and objects")


def _depth(text: str) -> int:
    """How deep a JSON text nests: its brackets counted, those within its texts left out."""
    brackets = _OTHER.sub("", _TEXT.sub("", text))
    return max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _finite(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise ValueError(f"{text[:50]} is larger than any number of 64 bits")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _about(metadata: Any) -> About:
    if not isinstance(metadata, dict) or not all(isinstance(part, str) for part in metadata.values()):
        raise WireError("body.__metadata__", "must map names to texts", metadata)
    if _KEY not in metadata:
        return About()
    found = load(metadata[_KEY], f"body.__metadata__.{_KEY}")
    if not isinstance(found, dict):
        raise WireError(f"body.__metadata__.{_KEY}", "must be the JSON text of an object", found)
    return About(found)


def _entry(name: str, value: Any) -> Entry:
    where = f"body.{name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WireError(where, "must have dtype, shape and data_offsets", value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM:
        raise WireError(f"{where}.dtype", f"must be one of {', '.join(ITEM)}", dtype)
    if not _sizes(shape) or len(shape) > _MAX_AXES:
        raise WireError(f"{where}.shape", f"must be a list of at most {_MAX_AXES} sizes", shape)
    if not _sizes(offsets) or len(offsets) != 2:
        raise WireError(f"{where}.data_offsets", "must be a start and a stop", offsets)
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM[dtype]:
        rule = f"must span the {math.prod(shape) * ITEM[dtype]} bytes of its shape"
        raise WireError(f"{where}.data_offsets", rule, offsets)
    return Entry(name, dtype, tuple(shape), start, stop)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
