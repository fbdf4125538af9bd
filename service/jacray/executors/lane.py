"""One job's way through the dispatcher, and whose turn it is when several jobs want the same worker."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Sized
from dataclasses import dataclass

from jacray_workers.plan import Shard

from jacray.executors.base import Step, Task


@dataclass(frozen=True)
class Try:
    """A shard about to be handed out.

    Attributes:
        shard: which.
        attempt: the how manieth time, from 1.
        avoid: the place where it went wrong before, which gets it again only if there is no other.
        halvings: how often its chunks are halved, because workers ran out of memory over it.
    """

    shard: Shard
    attempt: int = 1
    avoid: int | None = None
    halvings: int = 0


class Lane:
    """What is left of one job, what of it is in flight, and what its owner has not read yet."""

    def __init__(self, task: Task, lock: threading.Lock) -> None:
        self.task = task
        self.news = threading.Condition(lock)
        self.steps: collections.deque[Step | Exception] = collections.deque()
        self.again: collections.deque[Try] = collections.deque()
        self.flights = 0
        self.begun = self.idle = self.closing = False
        self.served = 0.0
        self._unsent = task.plan.shard_count - (len(task.kept) if isinstance(task.kept, Sized) else 0)
        self._fresh = task.shards()
        self._ahead: Shard | None = next(self._fresh, None)
        self._landed, self._seconds = 0, 0.0

    @property
    def waiting(self) -> bool:
        """Whether some shard has not been handed out."""
        return bool(self.again) or self._ahead is not None

    @property
    def left(self) -> int:
        """How many shards are to be handed out."""
        return self._unsent + len(self.again)

    @property
    def open(self) -> bool:
        """Whether it still wants its shards computed."""
        return not self.closing and not self.task.cancelled.is_set()

    def take(self, place: int, *, alone: bool) -> Try | None:
        """The next shard for the worker at a place, which may be the only one there is."""
        for i, again in enumerate(self.again):
            if alone or again.avoid != place:
                del self.again[i]
                return again
        shard, self._ahead = self._ahead, None
        if shard is None:
            return None
        self._ahead = next(self._fresh, None)
        self._unsent -= 1
        return Try(shard)

    def tell(self, step: Step | Exception) -> None:
        """Put a step where the job's thread finds it."""
        self.steps.append(step)
        self.news.notify()

    def learn(self, seconds: float) -> None:
        """Take note of how long a shard took."""
        self._landed, self._seconds = self._landed + 1, self._seconds + seconds

    @property
    def expected(self) -> float:
        """How many seconds a worker will take over a shard of this job; 0 while nobody knows."""
        return self._seconds / self._landed if self._landed else 0.0


class Shares:
    """Worker-seconds that each user and each job has had: whoever had least is next.

    A shard is charged at what it is expected to take when it is handed out, and put right when it is done. A newcomer
    starts level with whoever had least, so that it neither waits for the others nor holds them up.
    """

    def __init__(self) -> None:
        self._users: dict[str, float] = {}

    def join(self, lane: Lane, others: Iterable[Lane]) -> None:
        """Let a job in."""
        mates = [other.served for other in others if other.task.user == lane.task.user]
        lane.served = min(mates, default=0.0)
        if not mates:
            self._users[lane.task.user] = min(self._users.values(), default=0.0)

    def leave(self, lane: Lane, others: Iterable[Lane]) -> None:
        """Let a job go."""
        if all(other.task.user != lane.task.user for other in others):
            self._users.pop(lane.task.user, None)

    def charge(self, lane: Lane, seconds: float) -> None:
        """Count worker-seconds, or take some back."""
        lane.served += seconds
        if lane.task.user in self._users:
            self._users[lane.task.user] += seconds

    def order(self, lanes: Iterable[Lane]) -> list[Lane]:
        """The jobs, next first."""
        return sorted(lanes, key=lambda lane: (self._users.get(lane.task.user, 0.0), lane.served, lane.flights))
