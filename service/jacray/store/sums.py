"""The sums of a job whose workers write: the shards' parts are added up in order as they come, and go once added.

What is added up so far is kept beside the parts, so that a job that is taken up again goes on from there; the parts of
a long job would else take many times what its sums do. Adding in the shards' order, in one precision, gives the same
bits wherever a job was interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from typing import Any

import numpy as np
import torch
import zarr
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.rowcuts import place
from torch import Tensor
from zarr.core.sync import sync

from jacray.gather import Sum
from jacray.store import blocks
from jacray.store.faults import writing
from jacray.store.group import PARTS, Store, as_numpy, codecs, node_name

# So many shards are added up between two times that the sums so far are kept: their parts take the room of so many
# sums, and keeping costs so many times less than the parts themselves.
KEEP_EVERY = 16
_KEPT = "kept."


class Sums:
    """The sums of one job as far as its shards have come in order.

    Args:
        store: the job's; what an earlier run has kept in it is taken over.

    Attributes:
        count: how many shards are added up, from the first on.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.arrays = [array for array in store.plan.arrays if array.axis < 0]
        self.count, totals = _kept(store, self.arrays)
        self._at = self.count
        self._sums = {array.key: Sum(totals.get(array.key), self.count) for array in self.arrays}

    def grow(self, upto: int, without: Container[int] = ()) -> None:
        """Add the parts of the shards before `upto`, which must all be there, but for those left out.

        Raises:
            StorageError: a part is damaged, or the store takes no more.
        """
        while self.arrays and self.count < upto:
            shard = self.store.plan.shard(self.count)
            for array in self.arrays:
                part = None if shard.index in without else _part(self.store, array, shard)
                self._sums[array.key].add(shard.index, part)
            self.count += 1
            if self.count - self._at == KEEP_EVERY:
                self._keep()

    def result(self, array: ArrayPlan) -> Tensor:
        """One sum, of what was added up."""
        return self._sums[array.key].result(getattr(torch, array.dtype), array.shape)

    def _keep(self) -> None:
        """Keep what is added up, then let go of the parts and of what was kept before."""
        totals = {array.key: as_numpy(self._sums[array.key].total) for array in self.arrays}
        name = f"{PARTS}/{_KEPT}{self.count}"
        with writing(self.store.target, sum(total.nbytes for total in totals.values())):
            for array in self.arrays:
                total = totals[array.key]
                made = zarr.create_array(
                    self.store.group.store, name=f"{name}/{node_name(array.key)}", shape=total.shape,
                    dtype=total.dtype, chunks=self.store.parts(array.key).chunks[1:], filters=None,
                    compressors=codecs(self.store.target), overwrite=True, config={"write_empty_chunks": True},
                )  # fmt: skip
                made[...] = total
            # Last: by these it counts.
            sums = {key: blocks.checksum(total) for key, total in totals.items()}
            self.store.group[name].attrs.update({"count": self.count, "checksums": sums})
            self._let_go()
        self._at = self.count

    def _let_go(self) -> None:
        for array in self.arrays:
            for index in range(self._at, self.count):
                _remove(self.store, self.store.parts(array.key), index)
        for name in _names(self.store):
            if name != f"{_KEPT}{self.count}":
                del self.store.group[f"{PARTS}/{name}"]


def added_up(store: Store) -> int:
    """How many shards' parts, from the first on, are in the sums that were kept, so that nothing else is needed."""
    return store.plan.shard_count if store.complete else _kept(store, [a for a in store.plan.arrays if a.axis < 0])[0]


def _kept(store: Store, arrays: list[ArrayPlan]) -> tuple[int, dict[str, Tensor]]:
    """The furthest sums that were kept and are as they were written."""
    for name in sorted(_names(store), key=lambda name: -int(name.removeprefix(_KEPT))) if arrays else ():
        try:
            group: Any = store.group[f"{PARTS}/{name}"]
            about = group.attrs.asdict()
            totals = {array.key: np.asarray(group[node_name(array.key)][...]) for array in arrays}
            if all(blocks.checksum(total) == about["checksums"][key] for key, total in totals.items()):
                return int(about["count"]), {key: torch.from_numpy(total) for key, total in totals.items()}
        except (KeyError, ValueError, OSError):
            continue  # begun and not finished, or damaged since: those before, or the parts, have to do
    return 0, {}


def _names(store: Store) -> list[str]:
    found = store.group.get(PARTS)
    return [name for name in found.group_keys() if name.startswith(_KEPT)] if isinstance(found, zarr.Group) else []


def _part(store: Store, array: ArrayPlan, shard: Shard) -> Tensor | None:
    """A shard's part of a sum; None where it has none."""
    if place(store.plan, array, shard) is None:
        return None
    there = (slice(shard.index, shard.index + 1), *(slice(0, n) for n in array.shape))
    return torch.from_numpy(blocks.read_node(store, array, store.parts(array.key), there)[0])


def _remove(store: Store, node: Any, index: int) -> None:
    """Take one shard's part away."""
    if store.target.path is not None and node.ndim > 1:
        # With its folders, which take room of their own.
        sync((node.store_path / f"c/{index}").delete_dir())
        return
    keys = [node.metadata.encode_chunk_key(at) for at in blocks.touched(node, (slice(index, index + 1),))]
    sync(_all(node, keys))


async def _all(node: Any, keys: list[str]) -> None:
    await asyncio.gather(*((node.store_path / key).delete() for key in keys))
