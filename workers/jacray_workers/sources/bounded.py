"""Compressed bytes of a known size, made whole again without ever holding more than that size."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

COMPRESSORS = ("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4")
"""Codecs whose output may be longer than what they are given."""


def decompressed(data: bytes, codec: str, settings: Mapping[str, Any], size: int) -> Any:
    """What was compressed.

    Args:
        data: what `codec` made of it.
        codec: one of `COMPRESSORS`.
        settings: of the codec, as numcodecs calls them.
        size: how many bytes it must be.

    Raises:
        ValueError: it would be more, or the data is none of the codec's.
    """
    if codec in ("gzip", "zlib"):
        return _inflated(data, 31 if codec == "gzip" else 15, size)
    if codec == "bz2":
        return _streamed(data, bz2.BZ2Decompressor, size)
    if codec == "lzma":
        how = {name: settings.get(name) for name in ("format", "filters")}
        return _streamed(data, lambda: lzma.LZMADecompressor(how["format"] or 1, None, how["filters"]), size)
    return _framed(data, codec, size)


def _over(size: int) -> ValueError:
    return ValueError(f"a chunk expands beyond the {size:,} bytes that its array declares")


def _inflated(data: bytes, wbits: int, size: int) -> bytes:
    """Deflated data; gzip's may come in several members."""
    found = bytearray()
    rest = data
    while rest:
        inflater = zlib.decompressobj(wbits)
        found += inflater.decompress(rest, size - len(found) + 1)
        if len(found) > size:
            raise _over(size)
        if not inflater.eof:
            raise ValueError("a compressed chunk ends too early")
        rest = inflater.unused_data
    return bytes(found)


def _streamed(data: bytes, decompressor: Callable[[], Any], size: int) -> bytes:
    found = bytearray()
    rest = data
    while rest:
        stream = decompressor()
        while not stream.eof:
            part = stream.decompress(rest, size - len(found) + 1)
            rest = b""
            found += part
            if len(found) > size:
                raise _over(size)
            if not part and stream.needs_input:
                raise ValueError("a compressed chunk ends too early")
        rest = stream.unused_data
    return bytes(found)


def _framed(data: bytes, codec: str, size: int) -> Any:
    """Formats that say at the front how much they hold; their libraries believe it."""
    from numcodecs import blosc, lz4, zstd

    if codec == "zstd":
        return zstd.decompress(data, np.empty(size, np.uint8))
    at = 4 if codec == "blosc" else 0
    if int.from_bytes(data[at : at + 4], "little") > size:
        raise _over(size)
    return (blosc if codec == "blosc" else lz4).decompress(data)
