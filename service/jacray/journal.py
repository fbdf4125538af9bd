"""The journal: what became of each job and each of its shards, in one SQLite file that survives whoever writes it.

The one truth that a coordinator reads when it starts again. One file serves a run folder with its one job, or a
service with many. In WAL mode a reader (`jacray status`) never waits for the writer, and what a killed writer had
committed is there; a shard whose commit a power failure took along is computed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

from jacray_workers.errors import JobError, Plain, StorageError, UserError

from jacray.entries import Counts, JobRow, JobState, ShardRow, ShardState, differing
from jacray.lock import hold

FORMAT = 1
ENDED: tuple[JobState, ...] = ("done", "failed", "cancelled")
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, key TEXT UNIQUE, state TEXT NOT NULL, user TEXT NOT NULL,
    digests TEXT NOT NULL, plan TEXT NOT NULL, plan_digest TEXT NOT NULL, spec TEXT NOT NULL,
    samples INTEGER NOT NULL, shards INTEGER NOT NULL,
    created REAL NOT NULL, began REAL, ended REAL, error TEXT NOT NULL, trace TEXT NOT NULL
);
CREATE TABLE shards (
    job TEXT NOT NULL, shard INTEGER NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL, worker TEXT NOT NULL,
    at REAL NOT NULL, seconds REAL NOT NULL, detail TEXT NOT NULL, error TEXT NOT NULL, trace TEXT NOT NULL,
    PRIMARY KEY (job, shard)
) WITHOUT ROWID;
"""


_JOB = tuple(f.name for f in fields(JobRow))
_SHARD = tuple(f.name for f in fields(ShardRow))
_JSON = ("digests", "plan", "spec", "detail")


class Journal:
    """An open journal. Safe to use from several threads; only one process at a time may write.

    Args:
        path: the file; it and its folder are made where there are none.
        read_only: look only. Needs a file that is there, and works while another process writes.

    Raises:
        JobError: another process is writing to it.
        StorageError: the file cannot be made or written.
        UserError: there is none, or another version of jacray wrote it.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        if read_only and not path.is_file():
            raise UserError("path", "must hold a journal", Plain(str(path)), "a run writes one into its folder")
        self._held = None if read_only else hold(path)
        try:
            self._db = self._open(read_only)
        except BaseException:
            self._let_go()
            raise

    def _open(self, read_only: bool) -> sqlite3.Connection:
        with self._storage():
            mode = "?mode=ro" if read_only else ""
            db = sqlite3.connect(
                f"file:{_quoted(self.path)}{mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=30
            )
            # Commits need not reach the disk before the next: after a power failure the last shards are computed again.
            db.execute("PRAGMA synchronous=NORMAL")
            found = int(db.execute("PRAGMA user_version").fetchone()[0])
            if not read_only:
                db.execute("PRAGMA journal_mode=WAL")
            if found == 0 and not read_only:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;")
            elif found != FORMAT:
                db.close()
                rule = f"must have format {FORMAT}"
                raise UserError(str(self.path), rule, found, "use the jacray that wrote it")
            return db

    def enter(self, job: JobRow) -> JobRow:
        """Take a job in.

        Returns:
            The job; or the earlier one, as it is now, where its key is known already.

        Raises:
            JobError: that earlier one is another job; names what differs.
        """
        with self._writing():
            if job.key is not None and (known := self.find(job.key)) is not None:
                changed = differing(known.digests, job.digests)
                if changed:
                    raise JobError("key", f"was used for another job ({'; '.join(changed)})", job.key, "use a new key")
                return known
            self._insert("jobs", _JOB, job, {})
        return job

    def job(self, identity: str) -> JobRow | None:
        """The job of this id."""
        return next(iter(self._jobs("WHERE id = ?", identity)), None)

    def find(self, key: str) -> JobRow | None:
        """The job of this idempotency key."""
        return next(iter(self._jobs("WHERE key = ?", key)), None)

    def jobs(self, states: Sequence[JobState] = ()) -> list[JobRow]:
        """The jobs in any of these states (all by default), oldest first."""
        where = f"WHERE state IN ({', '.join('?' * len(states))}) " if states else ""
        return self._jobs(f"{where}ORDER BY created", *states)

    def begin(self, identity: str) -> None:
        """A job runs now, perhaps not for the first time."""
        self._set(identity, state="running", began=time.time(), ended=None, error="", trace="")

    def end(self, identity: str, state: JobState, error: str = "", trace: str = "") -> None:
        """A job has ended."""
        self._set(identity, state=state, ended=time.time(), error=error, trace=trace)

    def forget(self, identity: str) -> None:
        """Remove a job and its shards."""
        with self._writing():
            self._run("DELETE FROM shards WHERE job = ?", identity)
            self._run("DELETE FROM jobs WHERE id = ?", identity)

    def put(self, identity: str, row: ShardRow) -> None:
        """Note what happened to a shard."""
        self._insert("shards", _SHARD, row, {"job": identity})

    def shards(self, identity: str, states: Sequence[ShardState] = ()) -> Iterator[ShardRow]:
        """The shards that something has happened to, in order; a page at a time, for a job may have millions."""
        extra = f"AND state IN ({', '.join('?' * len(states))}) " if states else ""
        after = -1
        while True:
            rows = self._read(
                f"SELECT {', '.join(_SHARD)} FROM shards WHERE job = ? AND shard > ? {extra}ORDER BY shard LIMIT 1000",  # noqa: S608
                identity, after, *states,
            )  # fmt: skip
            for row in rows:
                yield ShardRow(**_plain(_SHARD, row))
            if not rows:
                return
            after = int(rows[-1][0])

    def counts(self, identity: str) -> Counts:
        """How a job's shards stand."""
        rows = self._read(
            "SELECT state, COUNT(*), SUM(attempt - (state != 'again')) FROM shards WHERE job = ? GROUP BY state",
            identity,
        )
        by_state = {state: count for state, count, _ in rows}
        return replace(Counts(**by_state), retries=sum(extra for _, _, extra in rows))

    @property
    def changes(self) -> int:
        """How many rows were written since it was opened."""
        with self._lock:
            return self._db.total_changes

    def copied(self, path: Path) -> bytes:
        """A copy of what is in it now, made at a new path, as the bytes of one file.

        Raises:
            StorageError: there is no room for it.
        """
        with self._lock, self._storage(), contextlib.closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        return path.read_bytes()

    def replace(self, other: Journal) -> None:
        """Take over everything that another holds, in place of what is here."""
        with self._writing():
            self._run("DELETE FROM shards")
            self._run("DELETE FROM jobs")
            for job in other.jobs():
                self._insert("jobs", _JOB, job, {})
                for row in other.shards(job.id):
                    self.put(job.id, row)

    @property
    def alone(self) -> bool:
        """Whether no process writes to it now, so that what is `running` in it was interrupted."""
        if self._held is not None:
            return False
        with contextlib.suppress(JobError, StorageError):
            os.close(hold(self.path))
            return True
        return False

    def close(self) -> None:
        """Write everything into the one file and let go of it. Later calls do nothing."""
        with self._lock:
            if self._held is not None:
                with contextlib.suppress(sqlite3.Error):  # somebody reads: then it stays as it is
                    # A reader of a file in WAL mode leaves two more beside it; at rest it is in the older mode.
                    self._db.execute("PRAGMA busy_timeout=0")
                    self._db.execute("PRAGMA journal_mode=DELETE")
            self._db.close()
            self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _jobs(self, where: str, *values: Any) -> list[JobRow]:
        rows = self._read(f"SELECT {', '.join(_JOB)} FROM jobs {where}", *values)  # noqa: S608  (names of ours)
        return [JobRow(**_plain(_JOB, row)) for row in rows]

    def _set(self, identity: str, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._run(f"UPDATE jobs SET {names} WHERE id = ?", *values.values(), identity)  # noqa: S608  (names of ours)

    def _insert(self, table: str, names: Sequence[str], row: Any, more: Mapping[str, Any]) -> None:
        values = {**more, **{name: getattr(row, name) for name in names}}
        values = {name: json.dumps(v) if name in _JSON else v for name, v in values.items()}
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        self._run(f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({marks})", *values.values())  # noqa: S608

    def _run(self, statement: str, *values: Any) -> None:
        with self._lock, self._storage():
            self._db.execute(statement, values)

    def _read(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, self._storage():
            return self._db.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction."""
        with self._lock, self._storage():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        """What the storage refuses is told as such."""
        try:
            yield
        except sqlite3.Error as error:
            way_out = "mend that, then start the same job again: it goes on with what is left"
            raise StorageError("journal", f"could not be used: {error}", Plain(str(self.path)), way_out) from error


def _plain(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {name: json.loads(v) if name in _JSON else v for name, v in zip(names, row, strict=True)}


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path.absolute()))
