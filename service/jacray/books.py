"""What is kept of a job whose results go to a folder: its journal, and what an earlier run of it has finished."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jacray_workers.errors import CancelledError, JacrayError, JobError, Plain, StorageError
from jacray_workers.plan import Plan
from jacray_workers.shard import ShardResult

from jacray.entries import JobRow, differing
from jacray.journal import Journal
from jacray.mirror import Mirror
from jacray.plans import PINNED, pins, read_plan
from jacray.record import Record
from jacray.target import JOURNAL, Target


@dataclass
class Books:
    """One job's journal, held from when it is submitted until it has ended.

    Attributes:
        target: where the results go.
        journal: in the target's folder, or for a URL on this machine.
        digests: what the job is.
        row: the job as an earlier run left it, or as it was entered.
        mirror: what copies the journal to a URL; None for a folder.
    """

    target: Target
    journal: Journal
    digests: Mapping[str, str]
    row: JobRow | None = None
    mirror: Mirror | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan that an earlier run followed: only under the same plan are its shards of use."""
        return None if self.row is None else read_plan(self.row.plan)

    def enter(self, plan: Plan, key: str | None, user: str) -> str:
        """Note that the job runs now; returns its id."""
        from jacray.store import plain

        if self.row is None:
            identity = uuid.uuid4().hex[:12]
            self.row = self.journal.enter(
                JobRow(
                    identity, self.digests, plain(plan.to_dict()), plan.digest, plan.samples, plan.shard_count, key,
                    user=user, spec={"to": self.target.url},
                )
            )  # fmt: skip
        self.journal.begin(self.row.id)
        if self.mirror is not None:
            self.mirror.begin()
        return self.row.id

    def record(self, plan: Plan) -> Record:
        """Where the job's shards are noted. The store must have been begun."""
        identity = "" if self.row is None else self.row.id
        still_ours = None if self.mirror is None else self.mirror.lease.check
        return Record(self.journal, identity, plan, _intact(self.target), still_ours)

    def end(self, error: BaseException | None) -> None:
        """Note how the job ended, and let go of the journal."""
        try:
            if self.row is not None:
                if error is not None:  # workers may have been ended in the middle of a file
                    from jacray import store

                    store.sweep(self.target)
                self._note(self.row.id, error)
        finally:
            _close(self.journal, self.mirror)

    def _note(self, identity: str, error: BaseException | None) -> None:
        if error is None:
            self.journal.end(identity, "done")
        elif isinstance(error, CancelledError):
            self.journal.end(identity, "cancelled")
        elif not isinstance(error, StorageError):  # with a full disk, `running` has to do: nobody runs it any more
            told = str(error) if isinstance(error, JacrayError) else f"{type(error).__name__}: {error}"
            self.journal.end(identity, "failed", told, "".join(traceback.format_exception(error)))


def open_books(target: Target | None, digests: Callable[[], Mapping[str, str]]) -> Books | None:
    """The books of a job; None for a job that nothing is kept of: one in memory.

    Args:
        target: where the results go.
        digests: makes what the job is; called where there are books.

    Raises:
        JobError: another process computes into that folder, or it holds another job; names what differs.
        StorageError: the journal cannot be written.
    """
    if target is None:
        return None
    journal, mirror = _journal(target)
    try:
        found = digests()
        earlier = next(iter(journal.jobs()), None)
        changed = [] if earlier is None else differing(earlier.digests, _pinned(found, earlier))
        if changed:
            way_out = "choose another folder, or remove that one"
            raise JobError("to", f"holds another job ({'; '.join(changed)})", Plain(target.url), way_out)
        earlier = _unless_broken(journal, target, earlier)
    except BaseException:
        _close(journal, mirror)
        raise
    return Books(target, journal, found, earlier, mirror)


def _journal(target: Target) -> tuple[Journal, Mirror | None]:
    """The journal beside the results, or for a URL the one that stands for it here."""
    if target.path is not None:
        return Journal(target.path / JOURNAL), None
    mirror = Mirror(target)
    return mirror.journal, mirror


def _close(journal: Journal, mirror: Mirror | None) -> None:
    if mirror is None:
        journal.close()
    else:
        mirror.close()


def _pinned(found: Mapping[str, str], earlier: JobRow) -> dict[str, str]:
    """What was left to the plan, or is as the earlier plan has it, counts as it did then."""
    plan = {name: str(value) for name, value in pins(read_plan(earlier.plan)).items()}
    same = {name for name in PINNED if found[name] in (str(PINNED[name]), plan[name])}
    return {**found, **{name: earlier.digests[name] for name in same}}


def _unless_broken(journal: Journal, target: Target, earlier: JobRow | None) -> JobRow | None:
    """The earlier job, unless its store is complete but its sums are damaged, which only computing all of it mends."""
    from jacray import store

    if earlier is None or not store.exists(target):
        return earlier
    opened = store.open_store(target)
    if opened.plan.digest != earlier.plan_digest:
        raise JobError("to", "holds a store that is not its journal's", Plain(target.url), "choose another folder")
    # The parts that sums were made of are gone once they are made.
    if opened.complete and any(store.damaged_sums(opened)):
        store.remove(target)
        journal.forget(earlier.id)
        return None
    return earlier


def _intact(target: Target) -> Callable[[ShardResult], bool]:
    """Reads what a shard wrote and compares its checksums, or behind a URL looks whether it is there."""
    recheck = target.path is not None if target.recheck is None else target.recheck
    opened: list[Any] = []

    def intact(result: ShardResult) -> bool:
        from jacray import store

        if not opened:
            found = store.open_store(target)
            opened.extend((found, store.added_up(found), None if recheck else target.sizes()))
        found, added, sizes = opened
        left = [w for w in result.written if not (found.arrays[w.key].axis < 0 and w.start < added)]
        if sizes is None:
            return bool(result.written) and all(store.verify(found, written) for written in left)
        return bool(result.written) and all(store.standing(found, written, sizes) for written in left)

    return intact
