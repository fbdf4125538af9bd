"""What readers of array files share: arrays that have not been read yet, and their way to tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain

_NUMBERS = "fiub"


@dataclass(frozen=True)
class Source:
    """One array of a file that has not been read.

    Attributes:
        shape: of the whole array.
        bytes: of the whole array.
        read: gives the rows from start to stop.
    """

    shape: tuple[int, ...]
    bytes: int
    read: Callable[[int, int], Tensor]


def from_numpy(array: np.ndarray[Any, Any], argument: str) -> Tensor:
    """A tensor over the array's memory where torch can take it as it is.

    Raises:
        InputError: the array holds no real numbers, or has no batch axis.
    """
    if array.dtype.kind not in _NUMBERS:
        raise InputError(argument, "must hold real numbers", Plain(f"dtype {array.dtype}"))
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    kept = native if native.flags.writeable and native.flags.c_contiguous else np.array(native, order="C")
    return torch.from_numpy(np.asarray(kept))


def rows_of(range_: tuple[int, int] | None, shape: tuple[int, ...], argument: str) -> tuple[int, int]:
    """The first row and the one after the last that a range means for this shape."""
    if not shape:
        raise InputError(f"{argument}.path", "must have the batch as its first axis", Plain("an array without axes"))
    check_range(range_, shape[0], argument)
    return range_ or (0, shape[0])


def check_range(range_: tuple[int, int] | None, samples: int, argument: str) -> None:
    """Refuse a range that reaches past the samples there are."""
    if range_ is not None and range_[1] > samples:
        raise InputError(f"{argument}.range", f"must end within the {samples} samples there are", list(range_))


def unreadable(argument: str, what: str, path: Path, error: Exception) -> InputError:
    """The error for a file that is not what its kind says."""
    return InputError(f"{argument}.path", f"must be a readable {what}: {error}", Plain(path.name))
