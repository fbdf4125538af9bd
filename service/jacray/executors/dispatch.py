"""Hand shards to workers: a bounded number in flight, whoever is free gets the next, what is lost is done again.

Knows workers only through `Pool`, so that the logic can be tried without processes.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from jacray_workers.errors import JacrayError, ShardError
from jacray_workers.plan import Shard

from jacray.executors.base import Begun, Done, Retried, Step, Task, samples_of, was_cancelled
from jacray.executors.worker import Reply, WorkerTraceback

# Two keep a worker busy while its last reply travels; more would only take shards away from faster workers.
DEPTH = 2
# A shard that took this many workers with it is at fault itself.
ATTEMPTS = 4
# A kernel that has not come to its next chunk this many seconds after a cancel loses its worker.
GRACE = 1.0
# How long to look for news before looking whether the job was cancelled.
TICK = 0.25


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


class WorkerLostError(Exception):
    """The worker went away before it answered.

    Attributes:
        blame: whether the shard may have caused it; False for a worker that was ended on purpose.
    """

    def __init__(self, reason: str, *, blame: bool = True) -> None:
        super().__init__(reason)
        self.blame = blame


class Pool(Protocol):
    """Workers, as the dispatcher sees them."""

    def seats(self) -> Sequence[Seat]:
        """The workers that can compute now.

        Raises:
            ShardError: there is none, and none will come.
        """

    def submit(self, seat: Seat, task: Task, shard: Shard) -> Hashable:
        """Queue a shard at a worker; returns a ticket."""

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


@dataclass
class _Flight:
    shard: Shard
    seat: Seat
    attempt: int
    number: int


class Dispatch:
    """The shards of one task on their way through a pool."""

    def __init__(self, pool: Pool, task: Task) -> None:
        self.pool = pool
        self.task = task
        self.fresh = task.plan.shards()
        self.again: collections.deque[tuple[Shard, int]] = collections.deque()
        self.flights: dict[Hashable, _Flight] = {}
        self.load: collections.Counter[Seat] = collections.Counter()
        self.suspects: dict[Seat, int] = {}
        self.sent = 0
        self.begun = False

    def steps(self) -> Iterator[Step]:
        """The beginning, each shard as it is done, and each loss.

        Raises:
            JobError: the task was cancelled.
            ShardError: a shard was lost too often, or there is no worker.
            Exception: what a shard raised; the shards still in flight are ended first.
        """
        try:
            while self._fill() or self.flights:
                if self.task.cancelled.is_set():
                    raise was_cancelled(self.task)
                if self.sent and not self.begun:
                    self.begun = True
                    yield Begun()
                for ticket in self.pool.wait(list(self.flights), TICK):
                    yield self._land(ticket)
        finally:
            self._drain()

    def _fill(self) -> bool:
        """Give every free worker its next shards, evenly; returns whether some shard is still waiting."""
        seats = sorted(self.pool.seats(), key=lambda seat: self.load[seat])
        for depth in range(1, DEPTH + 1):
            for seat in seats:
                if self.load[seat] < depth and self._waiting():
                    self._send(seat, *self.again.popleft())
        return self._waiting()

    def _waiting(self) -> bool:
        if not self.again and (shard := next(self.fresh, None)) is not None:
            self.again.append((shard, 1))
        return bool(self.again)

    def _send(self, seat: Seat, shard: Shard, attempt: int) -> None:
        ticket = self.pool.submit(seat, self.task, shard)
        self.sent += 1
        self.flights[ticket] = _Flight(shard, seat, attempt, self.sent)
        self.load[seat] += 1

    def _land(self, ticket: Hashable) -> Step:
        flight = self._release(ticket)
        try:
            reply = self.pool.fetch(ticket)
        except WorkerLostError as lost:
            return self._retry(flight, lost)
        if reply.result is not None:
            return Done(reply.result, str(flight.seat))
        raise self._error(reply, flight)

    def _release(self, ticket: Hashable) -> _Flight:
        flight = self.flights.pop(ticket)
        self.load[flight.seat] -= 1
        if not self.load[flight.seat]:
            del self.load[flight.seat]
        return flight

    def _retry(self, flight: _Flight, lost: WorkerLostError) -> Retried:
        # Workers take shards in order, so only the oldest of those that went with a worker can be the cause.
        there = [f.number for f in self.flights.values() if f.seat == flight.seat]
        blame = lost.blame and flight.number == self.suspects.setdefault(flight.seat, min([flight.number, *there]))
        self.pool.replace(flight.seat, blame=lost.blame)
        if blame and flight.attempt >= ATTEMPTS:
            raise ShardError(
                f"{samples_of(flight.shard)} could not be computed: "
                f"{flight.attempt} workers were lost over them ({lost})"
            )
        self.again.append((flight.shard, flight.attempt + blame))
        return Retried(flight.shard, flight.attempt, str(lost))

    def _error(self, reply: Reply, flight: _Flight) -> Exception:
        if self.task.cancelled.is_set():
            return was_cancelled(self.task)
        error = reply.error or ShardError(f"{flight.seat} gave an empty reply")
        error.__cause__ = WorkerTraceback(reply.trace)
        if not isinstance(error, JacrayError):
            error.add_note(f"while computing {samples_of(flight.shard)}")
        return error

    def _drain(self) -> None:
        """Leave no shard of this task running: asked to stop first, and after a grace its worker is replaced."""
        if not self.flights:
            return
        self.pool.cancel(self.task)
        deadline = time.monotonic() + GRACE
        while self.flights and (left := deadline - time.monotonic()) > 0:
            for ticket in self.pool.wait(list(self.flights), left):
                self._release(ticket)
        for seat in {flight.seat for flight in self.flights.values()}:
            self.pool.replace(seat, blame=False)
        self.flights.clear()
