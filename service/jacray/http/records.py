"""One job of the service as it is known: whose, how far, what happened, and how it ended."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jacray.http.database import Database, now

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINAL = ("done", "failed", "cancelled")
KEPT_EVENTS = 1000
LATE_EVENTS = 200
COUNTS = ("samples", "samples_done", "shards", "shards_done", "retries")


@dataclass(eq=False)
class Record:
    """One job.

    Attributes:
        id, user, key: its id, whose it is, and the key that makes submitting it again harmless.
        digest: the sha256 of what was submitted.
        item: what the process that runs it is told.
        told: what is known of it as JSON data: counts, method, times.
        events: its latest events with their numbers.
        seen: how many events there were.
    """

    id: str
    user: str
    key: str
    digest: str
    state: State = "queued"
    submitted: float = field(default_factory=now)
    finished: float | None = None
    item: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    problem: dict[str, Any] | None = None
    planned: bool = False
    attempts: int = 0
    cancelled_by: Literal["", "user", "time"] = ""
    events: deque[tuple[int, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    seen: int = 0
    timer: asyncio.TimerHandle | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL

    def shown(self) -> dict[str, Any]:
        """What its owner sees."""
        counts = {name: self.told.get(name, 0) for name in COUNTS}
        until = self.finished if self.finished is not None else now()
        return {
            "id": self.id, "user": self.user, "key": self.key, "state": self.state, "planned": self.planned,
            "submitted": self.submitted, "started": self.told.get("started"), "finished": self.finished,
            "elapsed": until - self.submitted, **counts, "method": self.told.get("method", ""),
            "bytes_out": self.told.get("bytes_out", 0), "digest": self.digest,
            "model": self.told.get("model", ""), "problem": self.problem,
        }  # fmt: skip

    def follow(self, event: dict[str, Any]) -> None:
        """Take an event of the process that runs it into account."""
        kind = event["kind"]
        if kind == "ShardDone":
            self._count(samples_done=event["samples"], shards_done=1)
        elif kind == "ShardsKept":
            self._count(samples_done=event["samples"], shards_done=event["shards"])
        elif kind == "ShardRetried":
            self._count(retries=1)
        if kind not in ("JobDone", "JobFailed", "JobCancelled"):  # the end is told once the result lies on disk
            self.tell(event)

    def _count(self, **more: int) -> None:
        for name, count in more.items():
            self.told[name] = self.told.get(name, 0) + count

    def begin_again(self) -> None:
        """Forget how far an attempt came."""
        self.told.update(samples_done=0, shards_done=0, retries=0)

    def end(self, state: State, found: dict[str, Any] | None) -> None:
        """It has ended. Of its events the latest are kept, for who comes late."""
        self.stop_timer()
        self.state, self.problem, self.finished = state, found, now()
        self.events = deque(self.events, maxlen=LATE_EVENTS)
        kinds = {"done": "JobDone", "failed": "JobFailed", "cancelled": "JobCancelled"}
        self.tell({"kind": kinds[state], **({"error": found["detail"]} if found and state == "failed" else {})})

    def stop_timer(self) -> None:
        """It has ended, or waits again."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def tell(self, event: Mapping[str, Any]) -> None:
        """Add an event, and wake who waits."""
        self.seen += 1
        self.events.append((self.seen, dict(event)))
        self.wake()

    def wake(self) -> None:
        """Wake who waits for news."""
        self.news.set()
        self.news = asyncio.Event()


class Turns:
    """Jobs that wait: each user's in order, users in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Record]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, record: Record, *, first: bool = False) -> None:
        """Let a job wait; `first` before its owner's others."""
        queue = self._queues.setdefault(record.user, deque())
        if first:
            queue.appendleft(record)
        else:
            queue.append(record)

    def leave(self, record: Record) -> bool:
        """Take a job out; returns whether it waited."""
        queue = self._queues.get(record.user)
        if queue is None or record not in queue:
            return False
        queue.remove(record)
        return True

    def next(self) -> Record | None:
        """The job whose turn it is."""
        for user in list(self._queues):
            queue = self._queues[user]
            if queue:
                self._queues.move_to_end(user)
                return queue.popleft()
            del self._queues[user]
        return None


class Ledger:
    """The jobs in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[Record]:
        """Every job that is known, the oldest first."""
        return [_read(row) for row in await self._database.rows("select * from jobs order by submitted")]

    async def enter(self, record: Record) -> None:
        """A new job."""
        await self._database.run(
            "insert into jobs (id, user, key, body, state, submitted, told) values (?, ?, ?, ?, ?, ?, ?)",
            record.id, record.user, record.key, record.digest, record.state, record.submitted, _told(record),
        )  # fmt: skip

    async def save(self, record: Record) -> None:
        """How it is now."""
        await self._database.run(
            "update jobs set state = ?, finished = ?, told = ?, problem = ? where id = ?",
            record.state, record.finished, _told(record),
            json.dumps(record.problem) if record.problem else "", record.id,
        )  # fmt: skip

    async def forget(self, record: Record) -> None:
        """It was deleted."""
        await self._database.run("delete from jobs where id = ?", record.id)


def _told(record: Record) -> str:
    return json.dumps({**record.told, "item": record.item})


def _read(row: sqlite3.Row) -> Record:
    told = json.loads(row["told"])
    record = Record(
        row["id"], row["user"], row["key"], row["body"], row["state"], row["submitted"], row["finished"],
        told.pop("item", {}), told, json.loads(row["problem"]) if row["problem"] else None,
    )  # fmt: skip
    record.planned = bool(told.get("method"))
    return record
