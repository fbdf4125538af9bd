"""Numbers that lie in a file row after row, uncompressed: any rows are one range of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
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
        """The rows from start to stop. Of a local file, memory that is mapped and copied when it is written to."""
        rows = self._mapped(start, stop) if self.place.local else self._fetched(start, stop)
        tensor = from_numpy(rows, self.place.argument)
        return tensor.view(getattr(torch, self.torch_dtype)) if self.torch_dtype else tensor

    def _mapped(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        order: Literal["F", "C"] = "F" if self.fortran else "C"
        try:
            # Copy on write: torch cannot mark a tensor as read-only, and the file must never change.
            whole: np.ndarray[Any, Any] = np.memmap(
                self.place.path, np.dtype(self.dtype), "c", self.offset, self.shape, order
            )
        except (ValueError, OSError) as error:
            raise unreadable(self.place, "file of numbers", error) from None
        return whole[start:stop]

    def _fetched(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        if self.fortran and len(self.shape) > 1:
            # The rows are scattered over the whole array.
            columns = self._bytes(0, self.nbytes).view(self.dtype).reshape(self.shape[::-1]).T
            return columns[start:stop]
        row = math.prod(self.shape[1:]) * self.itemsize
        return self._bytes(start * row, stop * row).view(self.dtype).reshape(stop - start, *self.shape[1:])

    def _bytes(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        check_memory(stop - start, self.place.argument)
        found = np.empty(stop - start, np.uint8)
        with self.place.open() as stream:
            try:
                stream.seek(self.offset + start)
                data = stream.read(stop - start)
            except (OSError, ValueError) as error:
                raise unreadable(self.place, "file of numbers", error) from None
        if len(data) != len(found):
            raise InputError(
                self.place.argument, "must hold the bytes that its header promises", Plain(self.place.name)
            )
        found[:] = np.frombuffer(data, np.uint8)
        return found


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
