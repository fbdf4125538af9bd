"""A submitted job, as its owner sees it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from jacray_workers.errors import CancelledError, JobError
from jacray_workers.plan import Plan

from jacray.events import (
    Event,
    JobCancelled,
    JobDone,
    JobFailed,
    JobStarted,
    Listener,
    ShardDone,
    ShardFailed,
    ShardRetried,
    ShardsKept,
)
from jacray.log import EventLog
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
        retries: how many times a shard was lost with a worker, or raised, and was queued again.
        elapsed: seconds since the job was submitted, up to its end.
        error: the error's text where it failed, else empty.
        shards_failed: how many shards were given up.
        shards_kept: how many of the done were computed by an earlier run of the same job.
    """

    state: State
    samples_done: int
    samples: int
    shards_done: int
    shards: int
    retries: int
    elapsed: float
    error: str = ""
    shards_failed: int = 0
    shards_kept: int = 0

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
        self._log = EventLog(identity)
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
            CancelledError: the job was cancelled.
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
        """End the job soon: between two passes, or with its worker where that has not come after a second.

        In this process (`inline`) nothing ends a single call into torch: the job ends after it.

        Returns:
            False where the job had already ended.
        """
        if self.status().finished:
            return False
        self._cancel()
        return True

    def events(self) -> Iterator[Event]:
        """The events of the job, from its first on, until it has ended.

        A reader that lags by thousands gets a `Totals` in place of those that are no longer kept.
        """
        at = 0
        while True:
            with self._news:
                self._news.wait_for(lambda at=at: len(self._log) > at or self._status.finished)  # type: ignore[misc]
                fresh, finished, at = self._log.since(at), self._status.finished, len(self._log)
            yield from fresh
            if finished and not fresh:
                return

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each event as it happens, in the job's own thread, after all earlier ones at once.

        A listener that raises is not called again; the job goes on.
        """
        with self._news:
            for event in self._log.since(0):
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
        elif isinstance(error, CancelledError):
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
    changed: dict[str, Any] = {"elapsed": elapsed}
    match event:
        case JobStarted():
            changed["state"] = "running"
        case ShardDone():
            changed |= {
                "samples_done": status.samples_done + event.samples, "shards_done": status.shards_done + 1
            }  # fmt: skip
        case ShardsKept():
            changed |= {
                "samples_done": status.samples_done + event.samples, "shards_done": status.shards_done + event.shards,
                "shards_kept": event.shards,
            }  # fmt: skip
        case ShardFailed():
            changed["shards_failed"] = status.shards_failed + 1
        case ShardRetried():
            changed["retries"] = status.retries + 1
        case JobDone():
            changed["state"] = "done"
        case JobFailed():
            changed |= {"state": "failed", "error": event.error}
        case JobCancelled():
            changed["state"] = "cancelled"
    return replace(status, **changed)
