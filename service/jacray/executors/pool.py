"""Workers as the dispatcher sees them, so that its logic can be tried without processes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jacray_workers.plan import Shard

from jacray.executors.base import Task
from jacray.executors.worker import Reply


@dataclass(frozen=True)
class Seat:
    """One worker at one time: a worker that is replaced keeps its place and gets a new generation.

    Attributes:
        place: which of the pool's workers.
        generation: how often it was replaced.
    """

    place: int
    generation: int

    def __str__(self) -> str:
        return f"worker {self.place}" if self.generation == 0 else f"worker {self.place}.{self.generation}"


@dataclass
class Slot:
    """One place in a pool and the process that holds it now.

    Attributes:
        place: which.
        actor, greeting: the handle of the process, and of its first word.
        generation: how often it was replaced.
        ready: whether it has answered.
        false_starts: how often in a row it died before it did.
        opened: the tasks that it has.
        tickets: what it is at.
        leaving: whether it goes once it has nothing left to do.
    """

    place: int
    actor: Any
    greeting: Any
    generation: int = 0
    ready: bool = False
    false_starts: int = 0
    opened: set[str] = field(default_factory=set)
    tickets: set[Any] = field(default_factory=set)
    leaving: bool = False

    @property
    def seat(self) -> Seat:
        """Who sits there now."""
        return Seat(self.place, self.generation)


class WorkerLostError(Exception):
    """The worker went away before it answered.

    Attributes:
        blame: whether the shard may have caused it; False for a worker that was ended on purpose.
        memory: whether it is known to have run out of memory.
    """

    def __init__(self, reason: str, *, blame: bool = True, memory: bool = False) -> None:
        super().__init__(reason)
        self.blame = blame
        self.memory = memory


class Pool(Protocol):
    """Workers that come and go."""

    def seats(self) -> Sequence[Seat]:
        """The workers that can compute now.

        Raises:
            ShardError: there is none, and none will come.
        """

    def submit(self, seat: Seat, task: Task, shard: Shard, halvings: int) -> Hashable:
        """Queue a shard at a worker, its chunks halved so many times; returns a ticket."""

    def wait(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        """The tickets among these that are answered, as soon as one is or a worker joins, or after `seconds`."""

    def fetch(self, ticket: Hashable) -> Reply:
        """An answered ticket's reply.

        Raises:
            WorkerLostError: there is none.
        """

    def cancel(self, task: Task) -> None:
        """Ask every worker to end this task at its next chunk."""

    def replace(self, seat: Seat, *, blame: bool) -> None:
        """End this worker if it still lives, and start another in its place; once per generation."""
