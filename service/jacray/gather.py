"""Put a job's shards together as they come, in memory that is made once."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jacray_workers import pages
from jacray_workers.errors import InputError
from jacray_workers.plan import ArrayPlan, Plan, Shard
from jacray_workers.rowcuts import place
from jacray_workers.shard import ShardResult
from torch import Tensor


class Gathering(Protocol):
    """Takes a job's shards, in any order, and gives its arrays."""

    def into(self, shard: Shard) -> dict[str, Tensor]:
        """The parts of the arrays that a shard may write to directly, where memory is shared."""

    def add(self, result: ShardResult) -> None:
        """Take a shard, once."""

    def skip(self, shard: Shard) -> None:
        """Take note that a shard is given up: its samples are NaN in every array."""

    def finish(self) -> dict[str, Any]:
        """Every array by key.

        Raises:
            InputError: the shards do not cover the samples exactly once.
        """


class Sum:
    """Partial sums added up in the shards' order, whatever order they come in; those that came early wait.

    Args:
        total: what is added up already, of an earlier run of the same job.
        count: of how many shards that is.
    """

    def __init__(self, total: Tensor | None = None, count: int = 0) -> None:
        self.total = total
        self.count = count
        self.waiting: dict[int, Tensor | None] = {}
        self._own = False

    def add(self, index: int, part: Tensor | None) -> None:
        """Take the part of the shard at this index; None where it has none."""
        self.waiting[index] = part
        while self.count in self.waiting:
            self._grow(self.waiting.pop(self.count))
            self.count += 1

    def result(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The sum of all parts; zero where there are none."""
        return torch.zeros(shape, dtype=dtype) if self.total is None else self.total.to(dtype)

    def _grow(self, part: Tensor | None) -> None:
        if part is None or self.total is None:
            self.total = part if self.total is None else self.total
            return
        if not self._own:
            # Float64 keeps the sum of many partial sums from drifting with their number; a copy, for the first part
            # may lie in memory that is not ours to change.
            self.total, self._own = self.total.to(torch.float64, copy=True), True
        self.total += part


class Seen:
    """Which shards have come: as a count while they come in order, and a set of those that came early."""

    def __init__(self) -> None:
        self.count = 0
        self._early: set[int] = set()

    def add(self, index: int) -> None:
        """Note a shard.

        Raises:
            InputError: it has come before.
        """
        if index < self.count or index in self._early:
            raise InputError("results", "must hold every shard exactly once", f"shard {index} twice")
        self._early.add(index)
        while self.count in self._early:
            self._early.remove(self.count)
            self.count += 1

    def check(self, plan: Plan) -> None:
        """Whether every shard has come.

        Raises:
            InputError: some have not.
        """
        if self.count != plan.shard_count:
            found = f"{self.count + len(self._early)} of {plan.shard_count}"
            raise InputError("results", "must hold every shard exactly once", found)


class Gather:
    """The arrays of a job while its shards arrive, in any order.

    An array with an axis over the samples is made once, and shards are written or copied into their place; sums grow
    as their parts come; factors are kept and joined in the shards' order.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.placed = {a.key: a for a in plan.arrays if a.axis >= 0 and not a.factored}
        self.factored = {a.key: dict[int, Any]() for a in plan.arrays if a.factored}
        self.sums = {a.key: Sum() for a in plan.arrays if a.axis < 0}
        self.whole: dict[str, Tensor] = {}
        self.seen = Seen()
        self._last: tuple[Shard, dict[str, Tensor]] | None = None

    def into(self, shard: Shard) -> dict[str, Tensor]:
        """The parts of the arrays that belong to a shard, to be written to."""
        if self._last is not None and self._last[0] is shard:
            return self._last[1]
        parts = {key: self._part(array, shard) for key, array in self.placed.items()}
        found = {key: part for key, part in parts.items() if part is not None}
        self._last = shard, found
        return found

    def add(self, result: ShardResult) -> None:
        """Take a shard's blocks; nothing of theirs is referred to afterwards but what must wait for the others."""
        shard = result.shard
        self.seen.add(shard.index)
        for key, target in self.into(shard).items():
            block = result.blocks[key]
            if block is not target and block.data_ptr() != target.data_ptr():
                target.copy_(block)
        for key, parts in self.factored.items():
            parts[shard.index] = result.blocks[key]
        for key, total in self.sums.items():
            total.add(shard.index, result.blocks.get(key))

    def skip(self, shard: Shard) -> None:
        """Take note that a shard is given up: its samples are NaN in every array."""
        self.seen.add(shard.index)
        for target in self.into(shard).values():
            target.fill_(float("nan"))

    def finish(self) -> dict[str, Any]:
        """Every array by key.

        Raises:
            InputError: the shards do not cover the samples exactly once.
        """
        self.seen.check(self.plan)
        return {array.key: self._array(array) for array in self.plan.arrays}

    def _array(self, array: ArrayPlan) -> Any:
        if array.factored:
            parts = [part for _, part in sorted(self.factored[array.key].items())]
            return parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)
        if array.axis < 0:
            return self.sums[array.key].result(getattr(torch, array.dtype), array.shape)
        return self.whole[array.key]

    def _part(self, array: ArrayPlan, shard: Shard) -> Tensor | None:
        where = place(self.plan, array, shard)
        if where is None:
            return None
        if array.key not in self.whole:
            # What is made under the caller's inference mode could not be written to where shards are computed.
            with torch.inference_mode(mode=False):
                self.whole[array.key] = pages.empty(array.shape, getattr(torch, array.dtype))
        return self.whole[array.key][where]
