"""Numbers that lie in a file row after row, uncompressed: any rows are one range of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain, UserError
from jacray_workers.sources.arrays import check_memory, from_numpy
from jacray_workers.sources.places import Place, unreadable


@dataclass(frozen=True)
class RawArray:
    """An array within a file.

    Attributes:
        place: the file.
        offset: the place of its first byte.
        shape: of the whole array.
        dtype: numpy's text for it, byte order included.
        fortran: whether the first axis varies fastest.
        torch_dtype: what the bytes are read as where numpy lacks the type.
    """

    place: Place
    offset: int
    shape: tuple[int, ...]
    dtype: str
    fortran: bool = False
    torch_dtype: str = ""

    @property
    def nbytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from start to stop.

        Read and not mapped: a file that is cut off while it is mapped ends the process that looks at it.
        """
        row = math.prod(self.shape[1:])
        check_memory(row * (stop - start) * self.itemsize, self.place.argument)
        with self.place.open() as stream:
            try:
                rows = (self._columns if self.fortran and row > 1 else self._together)(stream, start, stop)
            except Exception as error:  # each service behind a URL has errors of its own
                if isinstance(error, UserError):
                    raise
                raise unreadable(self.place, "file of numbers", error) from None
        tensor = from_numpy(rows, self.place.argument)
        return tensor.view(getattr(torch, self.torch_dtype)) if self.torch_dtype else tensor

    def _together(self, stream: BinaryIO, start: int, stop: int) -> np.ndarray[Any, Any]:
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row = math.prod(self.shape[1:]) * self.itemsize
        self._fill(stream, start * row, found)
        return found

    def _columns(self, stream: BinaryIO, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows that are scattered: each number of a sample has a column of its own in the file."""
        if self.place.scheme != "file":
            whole = np.empty(self.shape[::-1], self.dtype)
            check_memory(whole.nbytes, self.place.argument)
            self._fill(stream, 0, whole)
            return whole.T[start:stop]
        found = np.empty((math.prod(self.shape[1:]), stop - start), self.dtype)
        for number, column in enumerate(found):
            self._fill(stream, (number * self.shape[0] + start) * self.itemsize, column)
        return found.reshape(*self.shape[:0:-1], stop - start).T

    def _fill(self, stream: BinaryIO, at: int, into: np.ndarray[Any, Any]) -> None:
        """Fill an array from its place in the file.

        Raises:
            InputError: the file ends before.
        """
        stream.seek(self.offset + at)
        view, done = into.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            part = stream.readinto(view[done:])  # type: ignore[attr-defined]  # all files of bytes have it
            if not part:
                rule = "must hold the bytes that its header promises"
                raise InputError(self.place.argument, rule, Plain(f"{self.place.name}, which ends before"))
            done += part


def check_extent(place: Place, shape: tuple[int, ...], itemsize: int, offset: int, end: int, what: str) -> None:
    """Refuse a shape that is no shape, or that promises more bytes than there are.

    Raises:
        InputError: naming both figures.
    """
    if len(shape) > 32 or any(isinstance(s, bool) or not 0 <= s < 2**48 for s in shape):
        raise InputError(place.argument, f"must be a {what} with a sensible shape", list(shape)[:40])
    if not shape:
        raise InputError(place.argument, "must have the batch as its first axis", Plain("an array without axes"))
    needed, there = math.prod(shape) * itemsize, end - offset
    if needed > there:
        shown = Plain(f"{there:,} bytes where shape {list(shape)} needs {needed:,}")
        raise InputError(place.argument, f"must be a {what} that holds what its header promises", shown)
