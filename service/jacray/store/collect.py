"""The shards of a job whose workers write: their receipts are counted, and what is summed is added up on the way."""

from __future__ import annotations

from typing import Any

import torch
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.rowcuts import place
from jacray_workers.shard import ShardResult
from torch import Tensor

from jacray.gather import Seen
from jacray.store import blocks, group
from jacray.store.group import Store
from jacray.store.lazy import StoredArray
from jacray.store.sums import Sums
from jacray.store.writer import Writer


class Collector:
    """Takes the shards of a job in any order, as `Gather` does, and holds none of them.

    Args:
        store: the job's, open for writing.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.plan = store, store.plan
        self._seen = Seen()
        self._sums = None if store.complete else Sums(store)
        self._writer: Writer | None = None
        self._without: set[int] = set()

    def into(self, shard: Shard) -> dict[str, Tensor]:
        """Nothing: workers have memory of their own."""
        del shard
        return {}

    def add(self, result: ShardResult) -> None:
        """Take a shard; blocks that its worker has not written are written here."""
        self._seen.add(result.shard.index)
        if result.blocks:
            self._write(result)
        self._grow()

    def skip(self, shard: Shard) -> None:
        """Give a shard up: NaN stands in its samples, and sums go without it."""
        self._seen.add(shard.index)
        self._without.add(shard.index)
        found: dict[str, Any] = {}
        for array in self.plan.arrays:
            where = place(self.plan, array, shard)
            if array.axis >= 0 and where is not None:
                found[array.key] = _nothing(array, where)
        self._write(ShardResult(shard, found))
        self._grow()

    def finish(self) -> dict[str, Any]:
        """Write the sums, mark the store as complete, and give its arrays by key.

        Raises:
            InputError: the shards do not cover the samples exactly once.
            StorageError: a part of a sum is lost, or the store takes no more.
        """
        self._seen.check(self.plan)
        # Without sums to make every shard was kept from an earlier run, or put where a damaged one was.
        sums = self._sums
        if sums is not None:
            for array in sums.arrays:
                blocks.write_block(self.store, array, sums.result(array))
        self.store = group.finish(self.store)
        return {array.key: StoredArray(self.store, array) for array in self.plan.arrays}

    def _grow(self) -> None:
        if self._sums is not None:
            self._sums.grow(self._seen.count, self._without)

    def _write(self, result: ShardResult) -> None:
        if self._writer is None:
            self._writer = Writer(self.store.target, self.plan)
        self._writer.write(result)


def _nothing(array: ArrayPlan, where: tuple[slice, ...]) -> Tensor:
    """NaN in the place of a shard's block."""
    from jacray_workers.blocks.block import dense_block

    shape = [s.stop - s.start for s in where] + list(array.shape[len(where) :])
    empty = torch.full(shape, float("nan"), dtype=getattr(torch, array.dtype))
    if not array.factored:
        return empty
    outs = 1 + array.out_axes
    return dense_block(empty, shape[1:outs], shape[outs:])
