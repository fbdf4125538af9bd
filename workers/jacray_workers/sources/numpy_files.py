"""Numpy's two formats, .npy and .npz, read by range from their headers; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import check_dtype, check_memory, from_numpy, stamped
from jacray_workers.sources.places import Place, Reach, locate, unreadable
from jacray_workers.sources.raw import RawArray, check_extent
from jacray_workers.sources.several import Arrays, arrays_of, same_rows
from jacray_workers.sources.specs import Npy, Npz

MAX_MEMBERS = 10_000
MAX_EXPANSION, FREE_EXPANSION = 200, 1 << 28  # deflate reaches 1,032; numbers that somebody measured hardly reach 50
_SKIP = 1 << 20
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    NotImplementedError,
    zlib.error,
)
_HEADER_ERRORS = (  # numpy takes a header apart as Python takes apart a literal, and fails in as many ways
    *(ValueError, OSError, EOFError, SyntaxError, RecursionError, MemoryError, TypeError, OverflowError),
    tokenize.TokenError,
)


def npy(spec: Npy, base: Path, argument: str, reach: Reach) -> Arrays:
    """The array of a .npy file."""
    place = locate(spec.path, base, f"{argument}.path", (".npy",), reach=reach)
    size = place.size()
    with place.open() as stream:
        shape, fortran, dtype = _header(stream, place)
        offset = stream.tell()
    check_extent(place, shape, dtype.itemsize, offset, size, "numpy array")
    inputs = {"": RawArray(place, offset, shape, dtype.str, fortran)}
    return Arrays(same_rows(inputs, {}, argument), argument, stamped(place), inputs, {})


def npz(spec: Npz, base: Path, argument: str, reach: Reach) -> Arrays:
    """The arrays of a .npz file."""
    place = locate(spec.path, base, f"{argument}.path", (".npz",), reach=reach)
    with _archive(place) as archive:
        members = _members(archive, place)
        known = {name: _opener(place, archive, info) for name, info in members.items()}
        return arrays_of(spec, place, known, argument)


def _header(stream: BinaryIO, place: Place) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis varies fastest, and dtype; the stream then stands at the numbers.

    Raises:
        InputError: this is no array of numbers. A pickled one is refused by its dtype, before anything is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
    except _HEADER_ERRORS as error:
        raise unreadable(place, "numpy array", error) from None
    check_dtype(dtype, place.argument)
    return shape, fortran, dtype


@contextlib.contextmanager
def _archive(place: Place) -> Iterator[zipfile.ZipFile]:
    with place.open() as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _ZIP_ERRORS as error:
            raise unreadable(place, "npz file", error) from None
        with archive:
            yield archive


def _members(archive: zipfile.ZipFile, place: Place) -> dict[str, zipfile.ZipInfo]:
    """Array name to its entry. Names that would leave a folder, twins and links have no business in an npz file."""
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise InputError(place.argument, f"must hold at most {MAX_MEMBERS:,} arrays", len(infos))
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        parts = info.filename.replace("\\", "/").split("/")
        linked = (info.external_attr >> 16) & 0o170000 == 0o120000
        if ".." in parts or not parts[0] or not name.isprintable() or linked or name in found:
            raise InputError(
                place.argument, "must be an npz file whose members have plain, distinct names", info.filename
            )
        if info.file_size > FREE_EXPANSION and info.file_size > MAX_EXPANSION * max(info.compress_size, 1):
            shown = Plain(f"{name}: {info.compress_size:,} bytes that become {info.file_size:,}")
            raise InputError(place.argument, f"must not expand more than {MAX_EXPANSION} times", shown)
        if info.filename.endswith(".npy"):
            found[name] = info
    return found


def _opener(place: Place, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    def open_member() -> ZippedArray:
        try:
            with archive.open(info) as stream:
                shape, fortran, dtype = _header(cast("BinaryIO", stream), place)
                offset = stream.tell()
        except _ZIP_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise unreadable(place, "npz file", error) from None
        check_extent(place, shape, dtype.itemsize, offset, info.file_size, "npz array")
        return ZippedArray(place, info.filename, offset, shape, dtype.str, fortran)

    return open_member


@dataclass(frozen=True)
class ZippedArray:
    """An array within a .npz file.

    Attributes:
        place: the file.
        member: its name there.
        offset: the place of its first byte in the member.
        shape: of the whole array.
        dtype: numpy's text for it.
        fortran: whether the first axis varies fastest.
    """

    place: Place
    member: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    fortran: bool

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from start to stop. What stands before them is unpacked and thrown away, piece by piece."""
        itemsize, scattered = np.dtype(self.dtype).itemsize, self.fortran and len(self.shape) > 1
        row = math.prod(self.shape[1:]) * itemsize
        first, last = (0, self.shape[0] * row) if scattered else (start * row, stop * row)
        check_memory(last - first, self.place.argument)
        data = np.frombuffer(self._bytes(first, last), self.dtype)
        if scattered:
            return from_numpy(data.reshape(self.shape[::-1]).T[start:stop], self.place.argument)
        return from_numpy(data.reshape(stop - start, *self.shape[1:]), self.place.argument)

    def _bytes(self, first: int, last: int) -> bytearray:
        found = bytearray(last - first)
        view, done = memoryview(found), 0
        try:
            with _archive(self.place) as archive, archive.open(self.member) as stream:
                stream.seek(self.offset + first)
                while done < len(found):
                    part = stream.read(min(_SKIP, len(found) - done))
                    if not part:
                        raise EOFError("it ends before its array does")
                    view[done : done + len(part)] = part
                    done += len(part)
        except _ZIP_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise unreadable(self.place, "npz file", error) from None
        return found
