"""Safetensors files, read by range: a header of JSON that is checked in full, then the numbers as they lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.places import Place, Reach, locate, unreadable
from jacray_workers.sources.raw import RawArray, check_extent
from jacray_workers.sources.several import Arrays, arrays_of
from jacray_workers.sources.specs import Safetensors

MAX_HEADER = 1 << 24
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
    "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip


def safetensors(spec: Safetensors, base: Path, argument: str, reach: Reach) -> Arrays:
    """The tensors of a safetensors file."""
    place = locate(spec.path, base, f"{argument}.path", (".safetensors",), reach=reach)
    header, offset = read_header(place)
    end = place.size()
    known = {name: (lambda e=entry: _array(e, place, offset, end)) for name, entry in header.items()}
    return arrays_of(spec, place, known, argument)


def read_header(place: Place) -> tuple[dict[str, Any], int]:
    """What the header says of each tensor, and where the numbers begin.

    Raises:
        InputError: this is no safetensors file.
    """
    size = place.size()
    with place.open() as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 10 or length > min(size - 8, MAX_HEADER):
            shown = Plain(f"a header of {length:,} bytes in a file of {size:,}")
            raise InputError(place.argument, "must be a readable safetensors file", shown)
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise unreadable(place, "safetensors file", error) from None
    if not isinstance(header, dict):
        raise InputError(place.argument, "must be a readable safetensors file", Plain("a header that is no mapping"))
    header.pop("__metadata__", None)
    return header, 8 + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _array(entry: Any, place: Place, offset: int, end: int) -> RawArray:
    """One tensor, its entry checked against the file.

    Raises:
        InputError: the entry is malformed, or promises what is not there.
    """
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise InputError(place.argument, "must be a safetensors file with dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(place.argument, f"must hold tensors of {', '.join(_DTYPES)}", dtype)
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise InputError(place.argument, "must be a safetensors file with whole, positive sizes and offsets", entry)
    first, last = offset + offsets[0], offset + offsets[1]
    array = RawArray(place, first, tuple(shape), _DTYPES[dtype], torch_dtype="bfloat16" if dtype == "BF16" else "")
    check_extent(place, array.shape, array.itemsize, first, min(last, end), "safetensors tensor")
    if last > end or array.nbytes != last - first:
        shown = Plain(f"{array.nbytes:,} bytes by its shape, {offsets[1] - offsets[0]:,} by its offsets")
        raise InputError(place.argument, "must be a safetensors file whose offsets fit its shapes and its size", shown)
    return array


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
