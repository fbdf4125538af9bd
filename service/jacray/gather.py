"""Put a job's shards together as they come, in memory that is made once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jacray_workers.engine import combine
from jacray_workers.plan import ArrayPlan, Plan, Shard
from jacray_workers.shard import ShardResult
from torch import Tensor


class Gather:
    """The arrays of a job while its shards arrive, in any order.

    An array with an axis over the samples is made once, and shards are written or copied into their place; the
    others (partial sums, factors) are kept until all are there and then combined in the shards' order.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.placed = {a.key: a for a in plan.arrays if a.axis >= 0 and not a.factored}
        self.rest = tuple(a for a in plan.arrays if a.key not in self.placed)
        self.whole: dict[str, Tensor] = {}
        self.kept: list[ShardResult] = []

    def into(self, shard: Shard) -> dict[str, Tensor]:
        """The parts of the arrays that belong to a shard, to be written to."""
        return {key: self._part(array, shard) for key, array in self.placed.items()}

    def add(self, result: ShardResult) -> None:
        """Take a shard's blocks; nothing of theirs is referred to afterwards but what must wait for the others."""
        for key, target in self.into(result.shard).items():
            block = result.blocks[key]
            if block.data_ptr() != target.data_ptr():
                target.copy_(block)
        waiting = {array.key: result.blocks[array.key] for array in self.rest}
        self.kept.append(replace(result, blocks=waiting))

    def finish(self) -> dict[str, Any]:
        """Every array by key.

        Raises:
            InputError: the shards do not cover the samples exactly once.
        """
        return {**self.whole, **combine(replace(self.plan, arrays=self.rest), self.kept)}

    def _part(self, array: ArrayPlan, shard: Shard) -> Tensor:
        if array.key not in self.whole:
            self.whole[array.key] = torch.empty(array.shape, dtype=getattr(torch, array.dtype))
        return self.whole[array.key].narrow(array.axis, shard.start, shard.stop - shard.start)
