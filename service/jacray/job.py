"""A submitted job, as its owner sees it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from jacray_workers.errors import JobError
from jacray_workers.plan import Plan

from jacray.events import Event, JobCancelled, JobDone, JobFailed, JobStarted, Listener, ShardDone, ShardRetried
from jacray.result import Result

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]


class JobTimeoutError(JobError, TimeoutError):
    """The result was not there in time; the job goes on."""


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        state: `queued`, `running`, `done`, `failed` or `cancelled`; the last three are final.
        samples_done, samples: how many samples are computed, of how many.
        shards_done, shards: the same in shards.
        retries: how many shards were lost with a worker and queued again.
        elapsed: seconds since the job was submitted, up to its end.
        error: the error's text where it failed, else empty.
    """

    state: State
    samples_done: int
    samples: int
    shards_done: int
    shards: int
    retries: int
    elapsed: float
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in ("done", "failed", "cancelled")


class Job:
    """A job on its way. Made by `Client.submit`.

    Attributes:
        id: a short unique name.
        plan: how the job is computed.
    """

    def __init__(self, identity: str, plan: Plan, cancel: Callable[[], None]) -> None:
        self.id = identity
        self.plan = plan
        self._cancel = cancel
        self._submitted = time.monotonic()
        self._news = threading.Condition()
        self._log: list[Event] = []
        self._listeners: list[Listener] = []
        self._status = JobStatus("queued", 0, plan.samples, 0, plan.shard_count, 0, 0.0)
        self._result: Result | None = None
        self._error: BaseException | None = None

    def status(self) -> JobStatus:
        """How far the job is now."""
        with self._news:
            known = self._status
        if known.finished:
            return known
        return replace(known, elapsed=time.monotonic() - self._submitted)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Args:
            timeout: how many seconds to wait at most; None waits to the end.

        Raises:
            JobTimeoutError: the job is not done yet; it goes on. Also a `TimeoutError`.
            JobError: the job was cancelled.
            Exception: what made the job fail.
        """
        if not self.wait(timeout):
            raise JobTimeoutError(
                "timeout", f"job {self.id} must finish within it", f"{timeout} s", "wait longer, or cancel the job"
            )
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise JobError("job", "has no result", self.id)
        return self._result

    def __await__(self) -> Generator[Any, None, Result]:
        """`await job` gives what `job.result()` gives."""
        from jacray.asynchronous import in_thread

        return in_thread(self.result).__await__()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has ended, however it did; returns whether it has."""
        with self._news:
            return self._news.wait_for(lambda: self._status.finished, timeout)

    def cancel(self) -> bool:
        """End the job soon: between two chunks, or with its worker where a chunk takes longer than a second.

        Returns:
            False where the job had already ended.
        """
        if self.status().finished:
            return False
        self._cancel()
        return True

    def events(self) -> Iterator[Event]:
        """Every event of the job, from its first on, until it has ended."""
        at = 0
        while True:
            with self._news:
                self._news.wait_for(lambda at=at: len(self._log) > at or self._status.finished)  # type: ignore[misc]
                fresh, finished = self._log[at:], self._status.finished
            yield from fresh
            at += len(fresh)
            if finished and not fresh:
                return

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each event as it happens, in the job's own thread, after all earlier ones at once.

        A listener that raises is not called again; the job goes on.
        """
        with self._news:
            for event in self._log:
                listener(event)
            self._listeners.append(listener)

    def __repr__(self) -> str:
        now = self.status()
        return f"Job({self.id}: {now.state}, {now.samples_done} of {now.samples} samples)"

    def emit(self, event: Event) -> None:
        """Take an event from what drives the job."""
        with self._news:
            self._status = _after(self._status, event, event.at - self._submitted)
            self._log.append(event)
            self._news.notify_all()
            for listener in list(self._listeners):
                self._tell(listener, event)

    def settle(self, result: Result | None, error: BaseException | None) -> None:
        """End the job, with a result or an error."""
        now = time.monotonic()
        self._result, self._error = result, error
        if error is None:
            self.emit(JobDone(self.id, now))
        elif isinstance(error, JobError):
            self.emit(JobCancelled(self.id, now))
        else:
            self.emit(JobFailed(self.id, now, f"{type(error).__name__}: {error}"))

    def _tell(self, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:
            logger.exception("a listener of job %s failed and is not called again", self.id)
            self._listeners.remove(listener)


def _after(status: JobStatus, event: Event, elapsed: float) -> JobStatus:
    """The status that an event leads to."""
    match event:
        case JobStarted():
            return replace(status, state="running", elapsed=elapsed)
        case ShardDone():
            return replace(
                status, samples_done=status.samples_done + event.samples, shards_done=status.shards_done + 1,
                elapsed=elapsed,
            )  # fmt: skip
        case ShardRetried():
            return replace(status, retries=status.retries + 1, elapsed=elapsed)
        case JobDone():
            return replace(status, state="done", elapsed=elapsed)
        case JobFailed():
            return replace(status, state="failed", error=event.error, elapsed=elapsed)
        case JobCancelled():
            return replace(status, state="cancelled", elapsed=elapsed)
    return status
