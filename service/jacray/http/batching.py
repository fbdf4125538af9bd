"""Which small work is computed next, where, and together with what.

Work of one kind (the same model, request and shapes) that waits is computed as one batch. Users take turns. While work
of a kind keeps coming, its batch waits a few milliseconds to fill; work that comes alone is never held back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jacray_workers.errors import FaultError, JobError

from jacray.http.calls import taken_over
from jacray.http.pool import Process, ProcessLostError
from jacray.http.problems import HttpError, problem

logger = logging.getLogger(__name__)

Found = tuple[Mapping[str, Any], bytes | memoryview]
"""What a process says of an answer, and the answer's bytes."""


class Waiting(Protocol):
    """Takes the answer to a piece of work, once: a future does."""

    def done(self) -> bool:
        """Whether it has come, or is no longer wanted."""

    def set_result(self, found: Found, /) -> None:
        """It has come."""


@dataclass(eq=False, slots=True)
class Ask:
    """One piece of small work that waits for its answer.

    Attributes:
        user: whose.
        kind: what it can be computed together with; None for nothing.
        model: which model it needs, to find a process that has it warm.
        samples: how many it holds.
        item: what the process is told about it; pieces that share it differ in their bodies' numbers alone.
        body: its bytes, or empty where a file holds them.
        answer: takes its answer.
    """

    user: str
    kind: Hashable | None
    model: str
    samples: int
    item: Mapping[str, Any]
    body: Sequence[bytes | memoryview]
    answer: Waiting = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    came: float = field(default_factory=time.monotonic)
    tries: int = 0


@dataclass(frozen=True)
class Rules:
    """Bounds of batches and queues.

    Attributes:
        window: seconds that a batch may wait to fill; 0 computes everything by itself.
        most: samples of one batch.
        asks: pieces of work of one batch.
        seconds: how long one batch may compute.
        per_user, in_all: how much work may wait.
    """

    window: float
    most: int
    asks: int
    seconds: float
    per_user: int
    in_all: int


class Watch(Protocol):
    """Takes what there is to count."""

    def batch(self, size: int, waited: float, facts: Mapping[str, Any]) -> None:
        """A batch was computed."""

    def process_lost(self, reason: str) -> None:
        """A process died or was ended."""


class Small:
    """The processes for small work and the queue before them. Lives on one event loop.

    Args:
        make: makes a process that is not started yet.
        count: how many.
        rules: bounds.
        watch: counts.
    """

    def __init__(self, make: Callable[[], Process], count: int, rules: Rules, watch: Watch) -> None:
        self._make, self._count, self.rules, self._watch = make, count, rules, watch
        self._queues: OrderedDict[str, deque[Ask]] = OrderedDict()
        self._waiting = 0
        self._news = asyncio.Event()
        self._recent: dict[Hashable, int] = {}
        self._alike: Counter[Hashable] = Counter()  # how many of each kind wait
        self._filling: dict[Hashable, tuple[int, asyncio.Event]] = {}  # kinds whose batch fills: how many it waits for
        self._seats: list[asyncio.Task[None]] = []
        self._warm: list[OrderedDict[str, None]] = [OrderedDict() for _ in range(count)]
        self._idle: set[int] = set()
        self.ready = 0
        self.busy = 0

    def start(self) -> None:
        """Start the processes without waiting for them."""
        self._seats = [asyncio.create_task(self._serve(i), name=f"compute-{i}") for i in range(self._count)]

    async def stop(self) -> None:
        """End the processes; work that waits is told so."""
        for task in self._seats:
            task.cancel()
        await asyncio.gather(*self._seats, return_exceptions=True)
        for queue in self._queues.values():
            for ask in queue:
                _fail(ask, HttpError(503, "service", "is stopping", None, "try again soon", {"Retry-After": "5"}))
        self._queues.clear()

    @property
    def waiting(self) -> int:
        """How much work waits."""
        return self._waiting

    async def compute(self, ask: Ask) -> Found:
        """Wait for the answer to a piece of work.

        Raises:
            HttpError: too much waits already.
        """
        answer: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        ask.answer = answer
        self.begin(ask)
        try:
            return await answer
        except asyncio.CancelledError:
            self._forget(ask)
            raise

    def begin(self, ask: Ask) -> None:
        """Let a piece of work wait; its `answer` is told.

        Raises:
            HttpError: too much waits already.
        """
        queue = self._queues.get(ask.user, ())
        if len(queue) >= self.rules.per_user or self._waiting >= self.rules.in_all:
            rule = (
                f"may have {self.rules.per_user} requests waiting" if len(queue) >= self.rules.per_user else "is busy"
            )
            raise HttpError(429, "requests", rule, None, "send fewer at a time", {"Retry-After": "1"})
        self._put(ask)

    def _put(self, ask: Ask) -> None:
        queue = self._queues.get(ask.user)
        if queue is None:
            queue = self._queues[ask.user] = deque()
        queue.append(ask)
        self._waiting += 1
        if ask.kind is None:
            self._news.set()
            return
        count = self._alike[ask.kind] = self._alike[ask.kind] + 1
        filling = self._filling.get(ask.kind)
        if filling is None:
            self._news.set()
        elif count >= filling[0]:
            filling[1].set()

    def _forget(self, ask: Ask) -> None:
        queue = self._queues.get(ask.user)
        if queue is not None and ask in queue:
            queue.remove(ask)
            self._taken(ask)

    def _taken(self, ask: Ask) -> None:
        """A piece of work waits no more."""
        self._waiting -= 1
        if ask.kind is not None:
            self._alike[ask.kind] -= 1
            if not self._alike[ask.kind]:
                del self._alike[ask.kind]

    async def _serve(self, seat: int) -> None:
        """One seat: keep a process in it, and give it batches for ever."""
        process: Process | None = None
        try:
            while True:
                if process is None:
                    process = await self._started(seat)
                batch = await self._next(seat)
                self.busy += 1
                try:
                    alive = await self._run(process, seat, batch)
                finally:
                    self.busy -= 1
                if not alive:
                    self.ready -= 1
                    await process.stop()
                    process = None
        finally:
            if process is not None:
                self.ready -= 1
                await process.stop()

    async def _started(self, seat: int) -> Process:
        delay = 0.1
        while True:
            process = self._make()
            try:
                await process.start()
            except (ProcessLostError, TimeoutError, OSError) as error:
                logger.error("a compute process could not be started: %s", error)
                await process.stop()
                await asyncio.sleep(delay)
                delay = min(delay * 2, 10.0)
                continue
            self._warm[seat].clear()
            self.ready += 1
            return process

    async def _next(self, seat: int) -> list[Ask]:
        """The next batch for a seat: the oldest work of the user whose turn it is, and what goes with it."""
        while True:
            self._idle.add(seat)
            first = self._pick(seat)
            while first is None:  # nothing waits, or another seat will take it: its model is warm there, or it fills
                self._news.clear()
                await self._news.wait()
                first = self._pick(seat)
            self._idle.discard(seat)
            if first.kind is not None and self._recent.get(first.kind, 1) > 1:
                await self._fill(first)
            batch = [] if first.answer.done() else self._gather(first)
            if self._waiting:
                self._news.set()  # for seats that left it to this one
            if batch:
                return batch

    def _pick(self, seat: int) -> Ask | None:
        """Take the first work of the next user, unless another seat suits it better."""
        for user in list(self._queues):
            queue = self._queues[user]
            if not queue:
                del self._queues[user]
                continue
            ask = next((one for one in queue if one.kind is None or one.kind not in self._filling), None)
            if ask is None:
                continue
            better = any(ask.model in self._warm[other] for other in self._idle if other != seat)
            if better and ask.model not in self._warm[seat]:
                continue
            queue.remove(ask)
            self._taken(ask)
            self._queues.move_to_end(user)
            return ask
        return None

    async def _fill(self, first: Ask) -> None:
        """Wait for as many as came last time, but no longer than the window."""
        wanted = min(self._recent.get(first.kind, 1), self.rules.asks) - 1
        left = first.came + self.rules.window - time.monotonic()
        if left <= 0 or self._alike[first.kind] >= wanted:
            return
        full = asyncio.Event()
        self._filling[first.kind] = wanted, full
        try:
            async with asyncio.timeout(left):
                await full.wait()
        except TimeoutError:
            pass
        finally:
            del self._filling[first.kind]

    def _gather(self, first: Ask) -> list[Ask]:
        """The work that is computed with the first: of its kind, users in turn, within the bounds."""
        batch, samples = [first], first.samples
        if first.kind is None or self.rules.window <= 0:
            return batch
        alike = [deque(ask for ask in queue if ask.kind == first.kind) for queue in self._queues.values()]
        while alike and len(batch) < self.rules.asks:
            queue = alike.pop(0)
            if not queue:
                continue
            ask = queue.popleft()
            if samples + ask.samples > self.rules.most:
                break
            batch.append(ask)
            samples += ask.samples
            alike.append(queue)
        taken = set(map(id, batch[1:]))
        for user, waiting in self._queues.items():
            if taken:
                self._queues[user] = deque(ask for ask in waiting if id(ask) not in taken)
        for ask in batch[1:]:
            self._taken(ask)
        self._recent[first.kind] = len(batch)
        while len(self._recent) > 1024:
            self._recent.pop(next(iter(self._recent)))
        return batch

    async def _run(self, process: Process, seat: int, batch: list[Ask]) -> bool:
        """Compute a batch; returns whether the process can go on."""
        began = time.monotonic()
        head = {"id": id(batch), "items": _told(batch)}
        payload = [part for ask in batch for part in ask.body]
        try:
            async with asyncio.timeout(self.rules.seconds):
                found, data = await process.exchange(head, payload)
        except TimeoutError:
            self._ended(batch, _too_long(self.rules.seconds), "time")
            return False
        except ProcessLostError:
            self._ended(batch, FaultError("the process that computed this ended; it may need more memory"), "died")
            return False
        except Exception as error:  # a seat that nobody serves any more would let all work wait for ever
            logger.error("a batch could not be passed on", exc_info=error)
            self._ended(batch, FaultError("the service could not pass this on; its log says more"), "fault")
            return False
        self._warm[seat][batch[0].model] = None
        self._warm[seat].move_to_end(batch[0].model)
        while len(self._warm[seat]) > 64:
            self._warm[seat].popitem(last=False)
        self._watch.batch(len(batch), began - batch[0].came, found["facts"])
        at, view = 0, memoryview(data)
        answers = found["answers"] if "times" not in found["answers"][0] else found["answers"] * len(batch)
        for ask, answer in zip(batch, answers, strict=True):
            count = 0 if "file" in answer else answer.get("size", 0)
            # At once: whoever asked may be gone, now or before the answer is sent, and nothing may be left then.
            mine = {**answer, "file": taken_over(Path(answer["file"]))} if "file" in answer else answer
            if not ask.answer.done():
                ask.answer.set_result((mine, view[at : at + count]))
            at += count
        return True

    def _ended(self, batch: list[Ask], error: Exception, reason: str) -> None:
        """The process is gone: a piece that was computed with others may not be to blame and is tried alone."""
        self._watch.process_lost(reason)
        for ask in batch:
            ask.tries += 1
            if ask.answer.done():
                continue
            if len(batch) > 1 or (reason == "died" and ask.tries < 2):
                ask.kind = None
                self._put(ask)
            else:
                _fail(ask, error)


def _told(batch: Sequence[Ask]) -> list[Mapping[str, Any]]:
    """What a process is told of a batch: once for pieces that differ in their numbers alone."""
    first = batch[0].item
    if len(batch) > 1 and all(ask.item is first for ask in batch):
        return [{**first, "times": len(batch)}]
    # Work of one kind has one model, which need not be told for every piece.
    return [first, *({name: part for name, part in ask.item.items() if name != "model"} for ask in batch[1:])]


def _too_long(seconds: float) -> JobError:
    return JobError(
        "request", f"must be computed within {seconds:g} s", None, "submit it as a job, which may take longer"
    )


def _fail(ask: Ask, error: Exception) -> None:
    if not ask.answer.done():
        found = problem(error)
        headers = error.headers if isinstance(error, HttpError) else {}
        ask.answer.set_result(({"status": found["status"], "problem": found, "headers": headers}, b""))
