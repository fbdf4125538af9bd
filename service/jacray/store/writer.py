"""What a worker does with a shard's blocks: into the store with them, and a receipt for each instead."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jacray_workers.errors import StorageError
from jacray_workers.plan import ArrayPlan, Plan, Shard
from jacray_workers.rowcuts import place
from jacray_workers.shard import ShardResult, Written
from torch import Tensor

from jacray.store import blocks
from jacray.store.group import Store, as_numpy, open_store
from jacray.target import Target


class Writer:
    """Writes the shards of one job, one at a time.

    Args:
        target: where the client made the store.
        plan: the job's.

    Raises:
        StorageError: the store is not there, or is another job's.
    """

    def __init__(self, target: Target, plan: Plan) -> None:
        self.plan = plan
        self.store = _the_same(target, plan)
        self._memory: dict[str, Tensor] = {}

    def into(self, shard: Shard) -> dict[str, Tensor]:
        """Memory for a shard's arrays: the same for every shard, for fresh memory costs more than the arithmetic."""
        found = {}
        for array in self.plan.arrays:
            where = place(self.plan, array, shard)
            if array.axis >= 0 and not array.factored and where is not None:
                found[array.key] = self._kept(array, where)
        return found

    def write(self, result: ShardResult) -> ShardResult:
        """Write a shard's blocks.

        Returns:
            The result with what was written in place of the blocks.

        Raises:
            StorageError: the store takes no more.
        """
        arrays = self.store.arrays
        written = tuple(self._write(arrays[key], block, result.shard) for key, block in result.blocks.items())
        return replace(result, blocks={}, written=written)

    def _write(self, array: ArrayPlan, block: Any, shard: Shard) -> Written:
        size = blocks.size_of(array, block)
        if array.factored:
            blocks.write_factors(self.store, array, block, shard)
            return Written(array.key, shard.start, shard.stop, size, blocks.factors_checksum(block))
        values = as_numpy(block, array.dtype)
        found = blocks.checksum(values)
        if array.axis < 0 and self.store.complete:  # added up before: of this shard only other blocks were damaged
            return Written(array.key, shard.index, shard.index + 1, size, found)
        if array.axis < 0:
            there = (slice(shard.index, shard.index + 1), *(slice(0, n) for n in array.shape))
            blocks.write_dense(self.store, self.store.parts(array.key), there, values[None])
            return Written(array.key, shard.index, shard.index + 1, size, found)
        where = place(self.plan, array, shard)
        if where is not None:
            blocks.write_dense(self.store, self.store.node(array.key), where, values)
        rows = shard.rows if array.name == "jacobian" else None
        return Written(array.key, shard.start, shard.stop, size, found, rows)

    def _kept(self, array: ArrayPlan, where: tuple[slice, ...]) -> Tensor:
        shape = [s.stop - s.start for s in where] + list(array.shape[len(where) :])
        kept = self._memory.get(array.key)
        if kept is None or kept.numel() < math.prod(shape):
            kept = self._memory[array.key] = torch.empty(math.prod(shape), dtype=getattr(torch, array.dtype))
        return kept[: math.prod(shape)].view(shape)


def _the_same(target: Target, plan: Plan) -> Store:
    """The store that the client made, as this machine sees it."""
    try:
        store = open_store(target, write=True)
    except ValueError as error:
        rule = f"{target.results} must be reached from every worker, but is not there on this one"
        way_out = "give a folder that all machines share, or a URL such as s3://BUCKET/RUN"
        raise StorageError("output", rule, None, way_out) from error
    if store.plan.digest != plan.digest:
        raise StorageError("output", f"{target.results} holds another job", None, "give each job a folder of its own")
    return store
