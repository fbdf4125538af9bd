"""Whether a store still holds what was written into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jacray_workers.errors import JobError, StorageError
from jacray_workers.plan import ArrayPlan, Shard
from jacray_workers.rowcuts import place
from jacray_workers.shard import Written

from jacray.store import blocks
from jacray.store.group import Store, node_name


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
    return written.key in store.arrays and look(store, written) is None


def standing(store: Store, written: Written, sizes: Mapping[str, int]) -> bool:
    """Whether a part that was written is there, and where it is not compressed as large as it must be, unread.

    Args:
        store: the job's.
        written: what a worker has written.
        sizes: of every file of the store, as `Target.sizes` lists them.
    """
    array = store.arrays.get(written.key)
    if array is None:
        return False
    if array.factored:
        index = written.start // store.plan.shard_size
        return f"{node_name(array.key)}/{index}/zarr.json" in sizes
    if array.axis < 0:
        return blocks.is_whole(store.parts(written.key), (slice(written.start, written.stop),), store.target, sizes)
    where = place(store.plan, array, Shard(0, written.start, written.stop, written.rows))
    return where is None or blocks.is_whole(store.node(written.key), where, store.target, sizes)


def look(store: Store, written: Written) -> Damage | None:
    """What is wrong with a part that was written, by the checksum of when it was; None where nothing is."""
    array = store.arrays[written.key]
    start, stop = (written.start, written.stop) if array.axis >= 0 else (-1, -1)
    try:
        found = _found(store, array, written)
    except (StorageError, JobError) as error:
        return _told(array, start, stop, error)
    if found == written.checksum:
        return None
    return Damage(written.key, start, stop, False, f"its checksum is {found} and was {written.checksum}")


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
    yield from damaged_sums(store)
    for shard in store.plan.shards():
        yield from damaged_shard(store, shard)


def damaged_sums(store: Store) -> Iterator[Damage]:
    """The arrays without samples of a complete store that are lost or damaged."""
    for array in store.plan.arrays:
        if array.axis < 0:
            yield from _damage(store, array, -1, -1, (slice(None),) * len(array.shape))


def damaged_shard(store: Store, shard: Shard) -> Iterator[Damage]:
    """A shard's blocks that are lost or damaged, of arrays with samples."""
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
        yield _told(array, start, stop, error)


def _told(array: ArrayPlan, start: int, stop: int, error: StorageError | JobError) -> Damage:
    lost = "lost" in error.rule or isinstance(error, JobError)
    return Damage(array.key, start, stop, lost, str(error.value))
