"""Whether a run still holds what its workers wrote: every block is read and compared with what the journal knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jacray_workers.errors import Plain, UserError

from jacray import store
from jacray.entries import JobRow
from jacray.journal import Journal
from jacray.mirror import reading
from jacray.record import written_by
from jacray.store import Damage, Store
from jacray.target import Target


@dataclass
class Findings:
    """What looking through a run came to.

    Attributes:
        shards: how many shards its job has.
        seen: how many of them are finished and were looked at.
        damages: what is lost or damaged.
    """

    shards: int
    seen: int = 0
    damages: list[Damage] = field(default_factory=list)


def check(target: Target) -> Findings:
    """Read all that is finished of a run.

    Each chunk carries a checksum; the journal has another of each shard's block, which also finds a whole chunk that
    was put in another's place.

    Raises:
        UserError: there is no run.
    """
    try:
        return _looked_through(target)
    except KeyError:  # the job has ended meanwhile, and with it the parts that its sums were made of are gone
        return _looked_through(target)


def _looked_through(target: Target) -> Findings:
    if not store.exists(target):
        raise UserError("path", "must hold the results of a run", Plain(target.url))
    opened = store.open_store(target)
    found = Findings(opened.plan.shard_count)
    if opened.complete:
        found.damages.extend(store.damaged_sums(opened))
    with reading(target) as journal:
        if journal is not None and (jobs := journal.jobs()):
            found.damages.extend(_by_journal(opened, journal, jobs[0], found))
            return found
    for shard in opened.plan.shards() if opened.complete else ():
        found.seen += 1
        found.damages.extend(store.damaged_shard(opened, shard))
    return found


def _by_journal(opened: Store, journal: Journal, job: JobRow, found: Findings) -> Iterator[Damage]:
    """The finished shards by their checksums, the others of a complete store by those of its chunks."""
    added, seen = store.added_up(opened), set[int]()
    for row in journal.shards(job.id, ["done"]):
        seen.add(row.shard)
        for written in written_by(row):
            if not (opened.arrays[written.key].axis < 0 and written.start < added):
                damage = store.look(opened, written)
                yield from () if damage is None else (damage,)
    for shard in opened.plan.shards() if opened.complete else ():
        if shard.index not in seen:
            yield from store.damaged_shard(opened, shard)
    found.seen = opened.plan.shard_count if opened.complete else len(seen)
