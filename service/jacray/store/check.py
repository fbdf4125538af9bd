"""Whether a store still holds what was written into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jacray_workers.errors import JobError, StorageError
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.rowcuts import place
from jacray_workers.shard import Written

from jacray.store import blocks
from jacray.store.group import Store


@dataclass(frozen=True)
class Damage:
    """A block that is not as it was written.

    Attributes:
        key: the array.
        start, stop: the samples of the shard that it belongs to; -1 for an array without samples.
        lost: whether it is not there at all.
        reason: what was found.
    """

    key: str
    start: int
    stop: int
    lost: bool
    reason: str


def verify(store: Store, written: Written) -> bool:
    """Read a part again and compare it with the checksum of when it was written."""
    array = store.arrays.get(written.key)
    if array is None:
        return False
    try:
        return _found(store, array, written) == written.checksum
    except (StorageError, JobError):
        return False


def _found(store: Store, array: ArrayPlan, written: Written) -> str:
    if array.factored:
        return blocks.factors_checksum(blocks.read_factors(store, array, written.start, written.stop))
    if array.axis < 0:
        there = (slice(written.start, written.stop), *(slice(0, n) for n in array.shape))
        return blocks.checksum(blocks.read_node(store, array, store.parts(written.key), there))
    where = place(store.plan, array, Shard(0, written.start, written.stop, written.rows))
    return "" if where is None else blocks.checksum(blocks.read_place(store, array, where))


def damages(store: Store) -> Iterator[Damage]:
    """Every block of a complete store that is lost or damaged, shard by shard; each chunk carries a checksum."""
    for array in store.plan.arrays:
        if array.axis < 0:
            yield from _damage(store, array, -1, -1, (slice(None),) * len(array.shape))
    for shard in store.plan.shards():
        for array in store.plan.arrays:
            where = place(store.plan, array, shard)
            if array.axis >= 0 and where is not None:
                yield from _damage(store, array, shard.start, shard.stop, where)


def _damage(store: Store, array: ArrayPlan, start: int, stop: int, where: blocks.Place) -> Iterator[Damage]:
    try:
        if array.factored:
            blocks.read_factors(store, array, start, stop)
        else:
            blocks.read_place(store, array, where)
    except (StorageError, JobError) as error:
        lost = "lost" in error.rule or isinstance(error, JobError)
        yield Damage(array.key, start, stop, lost, str(error.value))
