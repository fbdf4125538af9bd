"""Arrays of a zarr store, local or behind a URL, read by range."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jacray_workers.errors import InputError, Plain, UserError
from jacray_workers.sources.arrays import check_dtype, check_memory, from_numpy
from jacray_workers.sources.bounded import COMPRESSORS, decompressed
from jacray_workers.sources.places import Place, Reach, listed, locate, unreadable
from jacray_workers.sources.several import Arrays, arrays_of
from jacray_workers.sources.specs import Zarr

# Codecs that only move or compress bytes. zarr's registry also knows one that unpickles, and whatever is installed.
_CODECS = frozenset(
    (
        *("bytes", "gzip", "zstd", "blosc", "crc32c", "transpose", "sharding_indexed"),
        *(f"numcodecs.{name}" for name in ("gzip", "zstd", "blosc")),
        *(p + name for name in ("zlib", "lz4", "bz2", "lzma", "shuffle") for p in ("", "numcodecs.")),
    )
)


_BOUNDED = "jacray.bounded"


@dataclass(frozen=True)
class ZarrArray:
    """An array of a zarr store.

    Attributes:
        place: the store.
        name: the array in it; empty where the store is the array.
        shape: of the whole array.
        chunk_bytes: of what is decoded at a time.
    """

    place: Place
    name: str
    shape: tuple[int, ...]
    chunk_bytes: int

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from start to stop."""
        check_memory(self.chunk_bytes, self.place.argument)
        try:
            node = _open(self.place)
            array = node if not self.name else node[self.name]
            found = np.asarray(_bounded(array)[start:stop])
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise unreadable(self.place, "zarr array", error) from None
        return from_numpy(found, self.place.argument)


def zarr(spec: Zarr, base: Path, argument: str, reach: Reach) -> Arrays:
    """The arrays of a group by name, or one array."""
    place = locate(spec.path, base, f"{argument}.path", reach=reach)
    if place.local and not place.folder:
        raise InputError(place.argument, "must be a zarr folder", Plain(place.name))
    try:
        node = _open(place)
        found = {"": node} if hasattr(node, "shape") else _members(node, spec, place)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(place, "zarr array or group", error) from None
    known = {name: functools.partial(_checked, array, name, place) for name, array in found.items()}
    return arrays_of(spec, place, known, argument)


def _open(place: Place) -> Any:
    import zarr as library

    store: Any = place.path if place.local else library.storage.FsspecStore.from_url(place.path, read_only=True)
    # Consolidated metadata would speak for other files than those that are there.
    return (
        library.open(store, mode="r", use_consolidated=False)
        if _is_group(store)
        else library.open_array(store, mode="r")
    )


def _is_group(store: Any) -> bool:
    import zarr as library

    try:
        library.open_group(store, mode="r", use_consolidated=False)
    except (library.errors.ContainsArrayError, FileNotFoundError, library.errors.NodeNotFoundError):
        return False
    return True


def _members(node: Any, spec: Zarr, place: Place) -> dict[str, Any]:
    """A group's arrays by name; a member that cannot be opened is there as the error it raises."""
    asked = [spec.arrays] if isinstance(spec.arrays, str) else list(spec.arrays or ())
    names = [name for name in (*asked, *spec.fields.values()) if _plain_name(name)]
    found = {name: _member(node, name) for name in names}
    # Not every store can be listed, but each can be asked for a name.
    if spec.arrays is None or len(found) < len({*asked, *spec.fields.values()}) or None in found.values():
        found |= {name: _member(node, name) for name in listed(place) if name not in found and _plain_name(name)}
    return {name: member for name, member in found.items() if member is not None}


def _member(node: Any, name: str) -> Any:
    """An array, None for what is no array, or what was raised."""
    try:
        found = node[name]
    except KeyError:
        return None
    except Exception as error:  # noqa: BLE001 - metadata written by anyone fails in any way
        return error
    return found if hasattr(found, "shape") else None


def _plain_name(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def _checked(array: Any, name: str, place: Place) -> ZarrArray:
    """An array that is worth opening: its type, its codecs and its chunks are such as numbers have.

    Raises:
        InputError: a codec could do more than move and compress bytes, or a chunk would not fit into memory.
    """
    if isinstance(array, Exception):
        raise unreadable(place, "zarr array", array)
    meta = array.metadata.to_dict()
    strange = [codec for codec in _codecs(meta) if codec not in _CODECS]
    if strange:
        allowed = f"allowed: {', '.join(sorted(_CODECS))}"
        raise InputError(
            place.argument, "must be stored with codecs that only move or compress bytes", strange[0], allowed
        )
    if meta.get("storage_transformers"):
        raise InputError(place.argument, "must be a zarr array without storage transformers", Plain(place.name))
    try:
        _bounded_metadata(meta, array.chunks)
    except ValueError as error:
        raise InputError(place.argument, f"must be a zarr array {error}", Plain(place.name)) from None
    dtype = np.dtype(array.dtype)
    check_dtype(dtype, place.argument)
    chunks = [tuple(array.chunks), tuple(getattr(array, "shards", None) or ())]
    if any(not 0 <= n < 2**48 for n in (*array.shape, *chunks[0], *chunks[1])):
        raise InputError(place.argument, "must be a zarr array with a sensible shape", list(array.shape))
    return ZarrArray(place, name, tuple(array.shape), max(math.prod(c) for c in chunks) * dtype.itemsize)


def _codecs(meta: Mapping[str, Any]) -> Iterator[str]:
    """The names of all codecs in an array's metadata, those within shards too."""
    for codec in [*(meta.get("codecs") or ()), *(meta.get("filters") or ()), meta.get("compressor")]:
        if not codec:
            continue
        plain = _plain(codec)
        yield str(plain.get("name") or plain.get("id"))
        inner = plain.get("configuration")
        if isinstance(inner, Mapping):
            yield from _codecs(inner)
            yield from _codecs({"codecs": inner.get("index_codecs")})


def _plain(codec: Any) -> dict[str, Any]:
    if isinstance(codec, dict):
        return codec
    found: dict[str, Any] = codec.get_config() if hasattr(codec, "get_config") else codec.to_dict()
    return found


def _bounded(array: Any) -> Any:
    """The same array, read without a chunk ever becoming larger than its array says."""
    import zarr as library

    _register()
    inner = array.async_array
    meta: Any = _bounded_metadata(inner.metadata.to_dict(), array.chunks)
    return library.Array(library.AsyncArray(metadata=meta, store_path=inner.store_path))


def _bounded_metadata(meta: Mapping[str, Any], chunks: tuple[int, ...]) -> dict[str, Any]:
    """An array's metadata with each compressor in a bounded one.

    Raises:
        ValueError: compressors stand where the size of what they hold is not known.
    """
    if meta["zarr_format"] == 3:
        return {**meta, "codecs": _bounded_codecs(meta["codecs"])}
    filters = [_plain(codec) for codec in meta.get("filters") or ()]
    compressor = _plain(meta["compressor"]) if meta.get("compressor") else None
    compressing = [c for c in (*filters, compressor) if c and c["id"] in COMPRESSORS]
    if len(compressing) > 1 or (compressing and compressing[0] is not compressor):
        raise ValueError("that is compressed once")
    if compressing and compressor is not None:
        itemsize = np.dtype(meta["dtype"]).itemsize if isinstance(meta["dtype"], str) else 0
        compressor = {"id": _BOUNDED, "codec": compressor, "size": math.prod(chunks) * itemsize}
    return {**meta, "filters": filters or None, "compressor": compressor}


def _bounded_codecs(codecs: Iterable[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    extra, before = 0, False
    for codec in map(_plain, codecs):
        name, settings = codec["name"].removeprefix("numcodecs."), dict(codec.get("configuration") or {})
        if name in COMPRESSORS:
            if before:
                raise ValueError("that is compressed once, and not as whole shards")
            inner = {"id": name, **settings}
            codec = {"name": _BOUNDED, "configuration": {"codec": inner, "extra": extra}}  # noqa: PLW2901
        elif name == "sharding_indexed":
            codec = {**codec, "configuration": {**settings, "codecs": _bounded_codecs(settings["codecs"])}}  # noqa: PLW2901
        before |= name in COMPRESSORS or name == "sharding_indexed"
        extra += 4 * (name == "crc32c")  # its checksum stands behind the bytes
        found.append(codec)
    return found


@functools.cache
def _register() -> None:
    """Make zarr know the bounded codec under a name of ours, for both of its formats."""
    import asyncio

    import numcodecs.abc
    import numcodecs.registry
    import zarr.registry
    from zarr.abc.codec import BytesBytesCodec

    class Bounded(BytesBytesCodec):
        """A compressor within bounds, for format 3."""

        is_fixed_size = False

        def __init__(self, codec: Mapping[str, Any], extra: int) -> None:
            self.codec, self.extra = dict(codec), extra

        @classmethod
        def from_dict(cls, data: Any) -> Any:
            return cls(**data["configuration"])

        def to_dict(self) -> Any:
            return {"name": _BOUNDED, "configuration": {"codec": self.codec, "extra": self.extra}}

        async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
            size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize + self.extra
            data = chunk_bytes.to_bytes()
            found = await asyncio.to_thread(decompressed, data, self.codec["id"], self.codec, size)
            return chunk_spec.prototype.buffer.from_array_like(np.frombuffer(found, np.dtype("B")))

        def compute_encoded_size(self, input_byte_length: int, _chunk_spec: Any) -> int:
            raise NotImplementedError

    class BoundedV2(numcodecs.abc.Codec):  # type: ignore[misc]  # the library has none
        """Likewise, for format 2."""

        codec_id = _BOUNDED

        def __init__(self, codec: Mapping[str, Any], size: int) -> None:
            self.codec, self.size = dict(codec), size

        def encode(self, _buf: Any) -> Any:
            raise NotImplementedError

        def decode(self, buf: Any, _out: Any = None) -> Any:
            return decompressed(bytes(buf), self.codec["id"], self.codec, self.size)

    zarr.registry.register_codec(_BOUNDED, Bounded)
    numcodecs.registry.register_codec(BoundedV2, _BOUNDED)
