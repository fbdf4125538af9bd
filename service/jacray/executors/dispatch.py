"""Hand shards to workers: a bounded number in flight, whoever is free gets the next, what is lost is done again.

All jobs of a pool share one `Dispatch`. There is no thread of its own: of the threads that wait for their job's next
step, one leads, which is to say it waits for workers on behalf of all of them.
"""

from __future__ import annotations

import collections
import errno
import threading
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from jacray_workers.errors import BudgetError, JacrayError, ModelError, Plain, ShardError, StorageError

from jacray.executors.base import Begun, Done, Failed, Retried, Step, Task, samples_of, was_cancelled
from jacray.executors.lane import Lane, Shares, Try
from jacray.executors.pool import Pool, Seat, WorkerLostError
from jacray.executors.worker import Reply, WorkerTraceback

# In flight per worker, over all jobs. Two keep a worker busy while its last reply travels; more would only take shards
# away from faster workers.
DEPTH = 2
# A shard that took this many workers with it is at fault itself.
ATTEMPTS = 4
# A shard that raised this often, on different workers where there are several, is given up.
RAISES = 2
# A kernel that has not come to its next chunk this many seconds after a cancel loses its worker.
GRACE = 1.0
# How long to look for news before looking whether a job was cancelled or joined.
TICK = 0.1
# How many of a job's steps may wait for its thread, for each worker: they hold results.
UNREAD = 2
# What the operating system says when it is the storage that fails, not the model.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class _Flight:
    lane: Lane
    seat: Seat
    item: Try
    number: int
    charged: float


class Dispatch:
    """The jobs of a pool on their way through its workers."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.lanes: list[Lane] = []
        self.flights: dict[Hashable, _Flight] = {}
        self.load: collections.Counter[Seat] = collections.Counter()
        # The shard that each worker is at, and since when.
        self.heads: dict[Seat, tuple[Hashable, float]] = {}
        self.suspects: dict[Seat, int] = {}
        self.sent = 0
        self._shares = Shares()
        self._lock = threading.Lock()
        self._leader: Lane | None = None

    def steps(self, task: Task) -> Iterator[Step]:
        """The beginning, each shard as it is done or given up, and each loss.

        Closing the iterator ends what is in flight.

        Raises:
            CancelledError: the task was cancelled.
            ShardError: there is no worker, and none will come.
        """
        lane = self._join(task)
        try:
            while (step := self._next(lane)) is not None:
                yield step
        finally:
            self._leave(lane)

    def _join(self, task: Task) -> Lane:
        lane = Lane(task, self._lock)
        with self._lock:
            self._shares.join(lane, self.lanes)
            self.lanes.append(lane)
        return lane

    def _next(self, lane: Lane) -> Step | None:
        with self._lock:
            try:
                while True:
                    if lane.task.cancelled.is_set():
                        raise was_cancelled(lane.task)
                    if lane.steps:
                        return _or_raise(lane.steps.popleft())
                    if not lane.waiting and not lane.flights:
                        return None
                    self._wait(lane, TICK)
            finally:
                self._pass_on(lane)

    def _wait(self, lane: Lane, seconds: float) -> None:
        """Lead for a turn, or wait for what the leader brings."""
        if self._leader in (None, lane):
            self._leader = lane
            self._turn(seconds)
            return
        lane.idle = True
        lane.news.wait(seconds)
        lane.idle = False

    def _pass_on(self, lane: Lane) -> None:
        """Who leaves the lead wakes another to take it."""
        if self._leader is lane:
            self._leader = None
            for other in self.lanes:
                if other.idle:
                    other.news.notify()
                    break

    def _turn(self, seconds: float) -> None:
        """Hand out, wait, take in. Holds the lock but while it waits."""
        try:
            self._fill()
            self._overdue(time.monotonic())
            tickets = list(self.flights)
            self._lock.release()
            try:
                answers = [(ticket, self._fetch(ticket)) for ticket in self.pool.wait(tickets, seconds)]
            finally:
                self._lock.acquire()
        except Exception as error:  # noqa: BLE001  (it concerns every job, and each is told)
            for lane in self.lanes:
                lane.tell(error)
            return
        for ticket, answer in answers:
            self._land(ticket, answer)

    def _fill(self) -> None:
        """Give every free worker its next shards, evenly."""
        seats = self.pool.seats()
        for depth in range(1, DEPTH + 1):
            for seat in sorted(seats, key=lambda seat: self.load[seat]):
                if self.load[seat] < depth:
                    self._give(seat, len(seats), ahead=depth > 1)

    def _give(self, seat: Seat, seats: int, *, ahead: bool) -> None:
        for lane in self._shares.order(self.lanes):
            # The last shards wait for whoever is free first, and not behind another one of a slow worker.
            if ahead and lane.left <= seats:
                continue
            if lane.open and len(lane.steps) < UNREAD * seats:
                item = lane.take(seat.place, alone=seats == 1)
                if item is not None:
                    self._send(lane, seat, item)
                    return

    def _send(self, lane: Lane, seat: Seat, item: Try) -> None:
        ticket = self.pool.submit(seat, lane.task, item.shard, item.halvings)
        self.sent += 1
        charged = lane.expected
        self._shares.charge(lane, charged)
        self.flights[ticket] = _Flight(lane, seat, item, self.sent, charged)
        self.load[seat] += 1
        lane.flights += 1
        self.heads.setdefault(seat, (ticket, time.monotonic()))
        if not lane.begun:
            lane.begun = True
            lane.tell(Begun())

    def _overdue(self, now: float) -> None:
        """A shard that takes too long is lost, and its worker with it."""
        for ticket, since in list(self.heads.values()):
            limit = self.flights[ticket].lane.task.timeout
            if limit is not None and now - since > limit:
                self._land(ticket, WorkerLostError(f"no answer within {limit:g} s"))

    def _fetch(self, ticket: Hashable) -> Reply | WorkerLostError:
        try:
            return self.pool.fetch(ticket)
        except WorkerLostError as lost:
            return lost

    def _land(self, ticket: Hashable, answer: Reply | WorkerLostError) -> None:
        flight = self.flights.get(ticket)
        if flight is None:  # its job has left
            return
        step = self._lost(flight, answer) if isinstance(answer, WorkerLostError) else self._answered(flight, answer)
        self._release(ticket)
        if not flight.lane.closing:
            flight.lane.tell(step)

    def _release(self, ticket: Hashable) -> None:
        """Take a shard off its worker's books."""
        flight, now = self.flights.pop(ticket), time.monotonic()
        seat, lane = flight.seat, flight.lane
        self.load[seat] -= 1
        lane.flights -= 1
        head, since = self.heads[seat]
        took = now - since if head == ticket else flight.charged
        lane.learn(took)
        self._shares.charge(lane, took - flight.charged)
        if not self.load[seat]:
            del self.load[seat], self.heads[seat]
            self.suspects.pop(seat, None)
        elif head == ticket:
            there = {f.number: t for t, f in self.flights.items() if f.seat == seat}
            self.heads[seat] = (there[min(there)], now)

    def _lost(self, flight: _Flight, lost: WorkerLostError) -> Step:
        # Workers take shards in order, so only the oldest of those that went with a worker can be the cause.
        item, oldest = flight.item, min(f.number for f in self.flights.values() if f.seat == flight.seat)
        blame = lost.blame and flight.number == self.suspects.setdefault(flight.seat, oldest)
        self.pool.replace(flight.seat, blame=lost.blame)
        if blame and item.attempt >= ATTEMPTS:
            error = ShardError(
                f"{samples_of(item.shard)} could not be computed: {item.attempt} workers were lost over them ({lost})"
            )
            return Failed(item.shard, error, item.attempt, str(flight.seat))
        avoid, halvings = (flight.seat.place, item.halvings + lost.memory) if blame else (item.avoid, item.halvings)
        flight.lane.again.append(Try(item.shard, item.attempt + blame, avoid, halvings))
        return Retried(item.shard, item.attempt, str(lost))

    def _answered(self, flight: _Flight, reply: Reply) -> Step:
        item = flight.item
        if reply.result is not None:
            return Done(reply.result, str(flight.seat), item.attempt)
        error = _error(reply, flight)
        if not _may_pass(error) or item.attempt >= RAISES:
            return Failed(item.shard, error, item.attempt, str(flight.seat))
        flight.lane.again.append(Try(item.shard, item.attempt + 1, flight.seat.place, item.halvings))
        return Retried(item.shard, item.attempt, f"{type(error).__name__}: {error}")

    def _leave(self, lane: Lane) -> None:
        """Leave no shard of this job running: asked to stop first, and after a grace its worker is replaced."""
        with self._lock:
            lane.closing = True
            lane.steps.clear()
            if lane.flights:
                self.pool.cancel(lane.task)
            deadline = time.monotonic() + GRACE
            # What is told to a lane that closes can only be that the pool is no more.
            while lane.flights and not lane.steps and (left := deadline - time.monotonic()) > 0:
                self._wait(lane, min(left, TICK))
            mine = [(ticket, flight.seat) for ticket, flight in self.flights.items() if flight.lane is lane]
            for ticket, _ in mine:
                self._release(ticket)
            for seat in {seat for _, seat in mine}:
                self.pool.replace(seat, blame=False)
            self.lanes.remove(lane)
            self._shares.leave(lane, self.lanes)
            self._pass_on(lane)


def _or_raise(step: Step | Exception) -> Step:
    if isinstance(step, Exception):
        raise step
    return step


def _may_pass(error: Exception) -> bool:
    """Whether another try may end otherwise: what the model raised, or memory that others held at the time."""
    return not isinstance(error, JacrayError) or type(error) in (ModelError, BudgetError)


def _error(reply: Reply, flight: _Flight) -> Exception:
    error = reply.error or ShardError(f"{flight.seat} gave an empty reply")
    if isinstance(error, OSError) and error.errno in _STORAGE:
        error = storage_error(error)
    error.__cause__ = WorkerTraceback(reply.trace)
    if not isinstance(error, StorageError):
        error.add_note(f"while computing {samples_of(flight.item.shard)}")
    return error


def storage_error(error: Exception, where: str = "") -> StorageError:
    """What the storage said, as an error that tells how to go on."""
    place = where or str(getattr(error, "filename", None) or "") or None
    said = getattr(error, "strerror", None) or str(error)
    way_out = "mend that, then start the same job again: it goes on with what is left"
    return StorageError("output.path", f"could not be written: {said}", place and Plain(place), way_out)
