"""Arrays of a zarr store, read by range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jacray_workers.errors import InputError
from jacray_workers.sources.arrays import Source, from_numpy, unreadable

# Codecs that only move or compress bytes. zarr's registry also knows one that unpickles.
_CODECS = frozenset(
    (
        "bytes",
        "gzip",
        "zstd",
        "blosc",
        "crc32c",
        "transpose",
        "sharding_indexed",
        "zlib",
        "lz4",
        "bz2",
        "lzma",
        "shuffle",
    )
)


@contextmanager
def zarr_arrays(path: Path, argument: str) -> Iterator[dict[str, Source]]:
    """The arrays of a group by name, or one array under the empty name.

    Raises:
        InputError: there is no zarr, or a codec could do more than move and compress bytes.
    """
    import zarr

    try:
        node = zarr.open(path, mode="r")
        arrays = {"": node} if isinstance(node, zarr.Array) else dict(node.arrays())
    except Exception as error:  # noqa: BLE001 - metadata written by anyone fails in any way
        raise unreadable(argument, "zarr array or group", path, error) from None
    yield {name: _zarr_source(array, argument) for name, array in arrays.items()}


def _zarr_source(array: Any, argument: str) -> Source:
    meta = array.metadata.to_dict()
    codecs = [*(meta.get("codecs") or ()), *(meta.get("filters") or ()), meta.get("compressor")]
    names = [str(codec.get("name") or codec.get("id")) for codec in map(_plain, codecs) if codec]
    strange = [name for name in names if name not in _CODECS]
    if strange:
        allowed = f"allowed: {', '.join(sorted(_CODECS))}"
        raise InputError(
            f"{argument}.path", "must be stored with codecs that only move or compress bytes", strange[0], allowed
        )
    dtype = np.dtype(array.dtype)
    size = int(np.prod(array.shape, dtype=object)) * dtype.itemsize
    return Source(tuple(array.shape), size, lambda a, b: from_numpy(np.asarray(array[a:b]), f"{argument}.path"))


def _plain(codec: Any) -> dict[str, Any]:
    if codec is None or isinstance(codec, dict):
        return codec or {}
    found: dict[str, Any] = codec.get_config() if hasattr(codec, "get_config") else codec.to_dict()
    return found
