"""What readers of inputs share: their one interface, arrays on their way to tensors, and bounds that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.planning.explain import size
from jacray_workers.sources.places import Place, Stamp, changed

Part = Tensor | list[str]
"""Some rows of one input: numbers, or texts that are not yet tokens."""

_KEPT = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_WIDENED = {"u2": "i4", "u4": "i8", "u8": "i8"}


class Reader(Protocol):
    """One source, opened: what is known of it without reading it. Picklable, holds no open file.

    A reader whose fields lie apart from its inputs has `read_fields(start, stop)` too, which reads no input.

    Attributes:
        samples: how many rows there are.
        argument: what the spec is called in errors.
        places: the files that are read, each with its stamp when it was opened.
    """

    samples: int
    argument: str
    places: tuple[tuple[Place, Stamp], ...]

    def read(self, start: int, stop: int) -> tuple[dict[str, Part], dict[str, Tensor]]:
        """The inputs by name (the empty name for a bare one) and the fields, from row start to row stop."""


@dataclass(frozen=True)
class Leaf:
    """One input or field.

    Attributes:
        shape: of one sample.
        dtype: of its numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one sample."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def stamped(*places: Place) -> tuple[tuple[Place, Stamp], ...]:
    """Places with what they are now."""
    return tuple((place, place.stamp()) for place in places)


def check_unchanged(places: Sequence[tuple[Place, Stamp]]) -> None:
    """Refuse files that are no longer what they were.

    Raises:
        InputError: naming the file.
    """
    for place, stamp in places:
        if place.stamp() != stamp:
            raise changed(place)


def check_dtype(dtype: np.dtype[Any], argument: str) -> None:
    """Refuse what is no real number that torch knows.

    Raises:
        InputError: naming the type.
    """
    if f"{dtype.kind}{dtype.itemsize}" not in (*_KEPT, *_WIDENED):
        raise InputError(argument, "must hold real numbers of at most 64 bits", Plain(f"dtype {str(dtype)[:60]}"))


def from_numpy(array: np.ndarray[Any, Any], argument: str) -> Tensor:
    """A tensor over the array's memory where torch can take it as it is. Unsigned numbers get a wider type.

    Raises:
        InputError: the array holds no real numbers, or unsigned ones beyond 63 bits.
    """
    check_dtype(array.dtype, argument)
    wider = _WIDENED.get(f"{array.dtype.kind}{array.dtype.itemsize}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and int(array.max()) >= 2**63:
        raise InputError(argument, "must hold whole numbers of at most 63 bits", int(array.max()))
    native = array.astype(wider) if wider else array.astype(array.dtype.newbyteorder("="), copy=False)
    flags = native.flags
    kept = native if flags.writeable and flags.c_contiguous and flags.aligned else np.array(native, order="C")
    return torch.from_numpy(np.asarray(kept))


def check_range(range_: tuple[int, int] | None, samples: int, argument: str) -> None:
    """Refuse a range that reaches past the samples there are."""
    if range_ is not None and range_[1] > samples:
        raise InputError(f"{argument}.range", f"must end within the {samples} samples there are", list(range_))


def check_memory(needed: int, argument: str) -> None:
    """Refuse what cannot fit, before anything is allocated.

    Raises:
        InputError: naming both figures.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        way_out = "take fewer samples with `range`, or a smaller shape"
        raise InputError(
            argument, f"must fit into the {size(free)} of memory that are free", Plain(size(needed)), way_out
        )


def picked(
    arrays: str | tuple[str, ...] | None, fields: Mapping[str, str], known: Sequence[str], argument: str
) -> dict[str, str]:
    """Input name to the name in the file, for files that hold several arrays; the empty input name for a bare tensor.

    Raises:
        InputError: a name is not in the file, or it must be said which arrays are inputs.
    """
    from jacray_workers.validation import nearest

    if isinstance(arrays, tuple):
        names = {name: name for name in arrays}
    elif arrays is not None:
        names = {"": arrays}
    else:
        free = [name for name in known if name not in fields.values()]
        if len(free) != 1:
            shown = ", ".join(free[:20]) + (f" and {len(free) - 20} more" if len(free) > 20 else "")
            found = Plain(f"the file holds {shown or 'none'}")
            raise InputError(
                f"{argument}.arrays", "must say which arrays are inputs where there is not just one", found
            )
        names = {"": free[0]}
    for where, name in [("arrays", n) for n in names.values()] + [(f"fields.{as_}", n) for as_, n in fields.items()]:
        if name not in known:
            raise InputError(f"{argument}.{where}", "names no array of the file", name, nearest(name, known))
    return names
