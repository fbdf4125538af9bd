"""An array of a store that is read when it is sliced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.rowcuts import place
from torch import Tensor

from jacray.store import blocks
from jacray.store.group import Store

# What `batches` holds at a time, and what is read at once where an index picks single samples.
BATCH_BYTES = 1 << 26


class StoredArray:
    """One array of a result, on disk. Slices read what they need and give tensors; a block in factors stays in factors.

    Indexing is by integers, slices and `...`, and by a list of samples on the first axis. `torch.as_tensor` and
    `numpy.asarray` read all of it.

    Attributes:
        key: its name in the store.
        shape: of the whole array.
        dtype: torch's.
    """

    def __init__(self, store: Store, array: ArrayPlan, lead: tuple[int, ...] = ()) -> None:
        self._store, self._array, self._lead = store, array, lead
        self.key = array.key
        self.shape = torch.Size(array.shape[len(lead) :])
        self.dtype: torch.dtype = getattr(torch, array.dtype)

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def axis(self) -> int:
        """Which axis runs over the samples; -1 for none."""
        return self._array.axis - len(self._lead) if self._array.axis >= 0 else -1

    @property
    def chunks(self) -> tuple[int, ...]:
        """What is read at once, of a dense array."""
        return tuple(self._store.node(self.key).chunks[len(self._lead) :]) if not self.factored else ()

    @property
    def factored(self) -> bool:
        """Whether it is kept in factors."""
        return self._array.factored

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        wanted = index if isinstance(index, tuple) else (index,)
        if wanted and isinstance(wanted[0], Sequence | Tensor | np.ndarray):
            return self._picked(wanted[0], wanted[1:])
        if self._array.factored:
            return self._in_factors(wanted)
        return self._dense(_expanded(wanted, self.ndim))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        whole: np.ndarray[Any, Any] = self.dense().numpy()
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        return self.dense().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return torch.empty(0).__dlpack_device__()

    def __repr__(self) -> str:
        kind = "in factors, " if self.factored else ""
        return f"StoredArray({tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')}, {kind}{self.key})"

    def at(self, index: int) -> StoredArray:
        """One place of a first axis that stands before the samples, as of several weights, without reading it."""
        if self.axis < 1:
            raise IndexError(f"{self.key} has no axis before the samples")
        return StoredArray(self._store, self._array, (*self._lead, range(len(self))[index]))

    def read(self) -> Tensor:
        """All of it as it is kept: a tensor, or a block in factors."""
        return self[...]

    def dense(self) -> Tensor:
        """All of it as a plain tensor."""
        whole = self.read()
        return whole.dense() if hasattr(whole, "dense") else whole

    def batches(self, size: int | None = None) -> Iterator[Tensor]:
        """The samples from first to last, `size` at a time; by default as many as 64 MiB hold."""
        axis = max(self.axis, 0)
        count = self.shape[axis]
        step = size or max(1, BATCH_BYTES // max(self.nbytes // max(count, 1), 1))
        for start in range(0, count, step):
            yield self[(*(slice(None),) * axis, slice(start, start + step))]

    @property
    def written(self) -> list[tuple[int, int]]:
        """The ranges of samples whose numbers are there; all of them once the job is done."""
        if self._array.axis < 0:
            return []
        found: list[tuple[int, int]] = []
        for (start, stop), shards in itertools.groupby(self._store.plan.shards(), lambda s: (s.start, s.stop)):
            if all(self._has(shard) for shard in shards):
                joined = bool(found) and found[-1][1] == start
                found[-1 if joined else len(found) :] = [(found[-1][0] if joined else start, stop)]
        return found

    def _has(self, shard: Shard) -> bool:
        where = place(self._store.plan, self._array, shard)
        return where is None or blocks.is_there(self._store, self._array, where, shard)

    def _dense(self, index: tuple[Any, ...]) -> Tensor:
        """What integers and slices pick: the range around it is read, and steps are taken in memory."""
        shape = self._array.shape
        pairs = zip((*self._lead, *index), shape, strict=True)
        where = [at if isinstance(at, slice) else _inside(int(at), n) for at, n in pairs]
        around = [
            slice(at, at + 1) if isinstance(at, int) else _forward(at, n) for at, n in zip(where, shape, strict=True)
        ]
        again = [0 if isinstance(at, int) else _again(at, n) for at, n in zip(where, shape, strict=True)]
        taken = blocks.read_place(self._store, self._array, tuple(around))[tuple(again)]
        return torch.from_numpy(np.ascontiguousarray(taken).reshape(taken.shape))

    def _in_factors(self, index: tuple[Any, ...]) -> Tensor:
        """A slice of samples by their factors; what else the index picks is picked from the block."""
        first = slice(None) if not index or index[0] is Ellipsis else index[0]
        rest = index if index and index[0] is Ellipsis else index[1:]
        if not isinstance(first, slice):
            at = _inside(int(first), len(self))
            return blocks.read_factors(self._store, self._array, at, at + 1)[(0, *rest)]
        around = _forward(first, len(self))
        found = blocks.read_factors(self._store, self._array, around.start, around.stop)
        again = list(range(around.stop - around.start))[_again(first, len(self))]
        return found if again == list(range(len(found))) and not rest else found[(again, *rest)]

    def _picked(self, samples: Any, rest: tuple[Any, ...]) -> Tensor:
        """Single samples by number, a run of neighbours at a time."""
        numbers = torch.as_tensor(samples)
        if numbers.dtype == torch.bool:
            numbers = numbers.nonzero()[:, 0]
        if numbers.dim() != 1 or self.axis != 0:
            raise IndexError(f"a list picks samples on the first axis; got one of shape {tuple(numbers.shape)}")
        wanted = [_inside(int(n), len(self)) for n in numbers.tolist()]
        if not wanted:
            return self[(slice(0, 0), *rest)]
        parts = [self[(slice(low, high), *rest)] for low, high in _runs(wanted)]
        if len(parts) == 1:
            return parts[0]
        cat = getattr(type(parts[0]), "cat", None)
        joined: Tensor = cat(parts) if cat is not None else torch.cat(parts)
        return joined


def _expanded(index: tuple[Any, ...], axes: int) -> tuple[Any, ...]:
    """One entry per axis."""
    dots = [n for n, at in enumerate(index) if at is Ellipsis]
    known = len(index) - len(dots)
    if len(dots) > 1 or known > axes:
        raise IndexError(f"too many indices for an array of {axes} axes")
    for at in index:
        if not isinstance(at, int | np.integer | slice) and at is not Ellipsis:
            raise IndexError(f"an array on disk takes integers, slices and a list of samples first; got {at!r}")
    at = dots[0] if dots else len(index)
    return (*index[:at], *(slice(None),) * (axes - known), *index[at + len(dots) :])


def _inside(at: int, size: int) -> int:
    if not -size <= at < size:
        raise IndexError(f"index {at} is out of range for an axis of {size}")
    return at % size


def _forward(at: slice, size: int) -> slice:
    """The range without steps that holds what a slice picks."""
    chosen = range(size)[at]
    if not len(chosen):
        return slice(0, 0)
    return slice(min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1)


def _again(at: slice, size: int) -> slice:
    """What a slice picks, within the range that `_forward` gives."""
    step = range(size)[at].step
    return slice(None) if step == 1 else slice(None, None, step)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbours in rising order, as half-open ranges."""
    low = previous = numbers[0]
    for number in numbers[1:]:
        if number != previous + 1:
            yield low, previous + 1
            low = number
        previous = number
    yield low, previous + 1
