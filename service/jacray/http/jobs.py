"""The service's jobs: who submitted what, whose turn it is, how far each is, and what a restart must take up again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jacray_workers.errors import FaultError, JobError, Plain

from jacray.http.calls import Body
from jacray.http.database import Database, now
from jacray.http.folders import JobFolder
from jacray.http.metrics import Metrics
from jacray.http.pool import Process, ProcessLostError
from jacray.http.problems import HttpError, problem
from jacray.http.records import Ledger, Record, State, Turns
from jacray.http.settings import Limits

logger = logging.getLogger(__name__)

ATTEMPTS = 3
GRACE = 15.0


class Jobs:
    """All jobs. Lives on one event loop.

    Args:
        folder: a folder per job.
        database: what outlives the process.
        make: makes the process that runs them, not started yet.
        limits: bounds.
        metrics: counts.
    """

    def __init__(
        self, folder: Path, database: Database, make: Callable[[], Process], limits: Limits, metrics: Metrics
    ) -> None:
        self.folder, self._make, self.limits, self.metrics = folder, make, limits, metrics
        self._ledger = Ledger(database)
        folder.mkdir(parents=True, exist_ok=True)
        self.records: OrderedDict[str, Record] = OrderedDict()
        self._keys: dict[tuple[str, str], Record] = {}
        self._turns = Turns()
        self._running: dict[str, Record] = {}
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._saving: set[asyncio.Task[Any]] = set()

    # Life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what a service before this one left, and start the process that runs jobs."""
        for record in await self._ledger.all():
            self._enter(record)
            if not record.final:
                logger.info("job taken up again", extra={"job": record.id, "user": record.user})
                record.state = "queued"
                self._turns.add(record)
        self._keeper = asyncio.create_task(self._keep(), name="jobs")

    def begin_stop(self) -> None:
        """Start no more jobs, and let go who waits for news of one: what is not done is taken up by the next start."""
        self._stopping = True
        for record in self.records.values():
            record.wake()

    async def stop(self, seconds: float) -> None:
        """Let running jobs finish for a while; what does not is taken up by the next start."""
        self.begin_stop()
        until = asyncio.get_running_loop().time() + seconds
        while self._running and asyncio.get_running_loop().time() < until:
            with contextlib.suppress(TimeoutError):
                record = next(iter(self._running.values()))
                await asyncio.wait_for(record.news.wait(), until - asyncio.get_running_loop().time())
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(*self._saving, return_exceptions=True)
        for record in self.records.values():
            record.wake()

    @property
    def ready(self) -> bool:
        """Whether the process that runs jobs is up."""
        return self._process is not None and self._process.ready

    @property
    def waiting(self) -> int:
        """How many jobs are queued."""
        return len(self._turns)

    # What users do ----------------------------------------------------------------------------------------------

    async def submit(
        self, user: str, key: str, body: Body, item: dict[str, Any], spec: Mapping[str, Any] | None
    ) -> tuple[Record, bool]:
        """Queue a job whose body has come whole.

        Args:
            user: whose.
            key: what makes submitting it again harmless.
            body: what was sent.
            item: what the process that runs it is told.
            spec: the file that it was submitted from, to be kept with it.

        Returns:
            The job, and whether it is new: the same key again gives the job that it was first given for.

        Raises:
            HttpError: the key belongs to another job, or the user has too many.
        """
        known = self._keys.get((user, key))
        if known is not None:
            if known.digest != body.digest:
                way_out = "give a key of its own to every job"
                raise HttpError(409, "Idempotency-Key", "was given for another job", Plain(key), way_out)
            return known, False
        open_jobs = sum(1 for r in self.records.values() if r.user == user and not r.final)
        if open_jobs >= self.limits.jobs_per_user:
            rule = f"may be {self.limits.jobs_per_user} at a time for each user"
            raise HttpError(429, "jobs", rule, open_jobs, "wait until some have ended", {"Retry-After": "5"})
        record = Record(uuid.uuid4().hex[:12], user, key, body.digest, item=item, told={"model": item["model_key"]})
        self._enter(record)  # before anything is awaited, so that the same key at the same time finds it
        folder = self.files(record)
        if "file" in item:
            record.item["file"] = str(folder.body)
        try:
            await asyncio.to_thread(_settle, folder, body, spec)
            await self._ledger.enter(record)
        except BaseException:  # a full disk, or the sender has left: nobody could ever start or end it
            await self._forget(record)
            raise
        self._turns.add(record)
        self._pump()
        return record, True

    def mine(self, user: str, identity: str) -> Record:
        """A job of this user.

        Raises:
            HttpError: there is none of this id, or it is somebody else's, which is told apart by nobody.
        """
        record = self.records.get(identity)
        if record is None or record.user != user:
            raise HttpError(404, "id", "names no job of yours", Plain(identity))
        return record

    def list(self, user: str, state: str | None, count: int) -> list[dict[str, Any]]:
        """A user's jobs, the latest first."""
        found = (r for r in reversed(self.records.values()) if r.user == user and state in (None, r.state))
        return [record.shown() for record, _ in zip(found, range(count), strict=False)]

    async def wait(self, record: Record, seconds: float, until: Callable[[Record], bool]) -> bool:
        """Wait until something holds of a job; returns whether it does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not until(record) and not self._stopping:
                    await record.news.wait()
        return until(record)

    async def cancel(self, record: Record, why: Literal["user", "time"] = "user") -> None:
        """End a job soon."""
        if record.final or record.cancelled_by:
            return
        record.cancelled_by = why
        if self._turns.leave(record):
            self._end(record, "cancelled", problem(_cancelled(record)))
        elif self.ready and self._process is not None:
            with contextlib.suppress(ProcessLostError):  # then `_lost` ends it
                await self._process.send({"do": "cancel", "job": record.id})

    async def remove(self, record: Record) -> None:
        """Forget a job and what it left; one that runs is cancelled first."""
        await self.cancel(record)
        await self.wait(record, 30.0, lambda r: r.final)
        if not record.final:
            raise HttpError(409, "id", "names a job that has not ended yet", Plain(record.id), "cancel it, then wait")
        await self._forget(record)

    async def events(self, record: Record, after: int) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """A job's events from a number on, until it has ended."""
        while True:
            news = record.news
            for number, event in list(record.events):
                if number > after:
                    after = number
                    yield number, event
            if (record.final and after >= record.seen) or self._stopping:
                return
            if after < record.seen:
                continue
            await news.wait()

    def files(self, record: Record) -> JobFolder:
        """A job's folder."""
        return JobFolder(self.folder / record.id)

    # What happens -----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Keep the process that runs jobs, and listen to it."""
        delay = 0.5
        while True:
            process = self._make()
            try:
                await process.start()
                self._process, delay = process, 0.5
                self._pump()
                while True:
                    head, _ = await process.receive()
                    self._hear(head)
            except Exception as error:  # whatever it was, jobs need somebody who runs them
                told = isinstance(error, ProcessLostError | TimeoutError | OSError)
                logger.error("the process that runs jobs ended: %s", error, exc_info=None if told else error)
                self.metrics.process_lost("jobs")
                # At once: what came from here on would be given to a process that is gone, and wait for ever.
                self._process = None
                self._lost()
            finally:
                self._process = None
                await process.stop(GRACE)  # by itself, so that it ends its Ray in order
            await asyncio.sleep(delay)
            delay = min(delay * 2, 30.0)

    def _lost(self) -> None:
        """Queue again what ran in a process that is gone; what was lost too often fails."""
        for record in list(self._running.values()):
            del self._running[record.id]
            record.stop_timer()
            if record.cancelled_by:
                self._end(record, "cancelled", problem(_cancelled(record)))
            elif record.attempts >= ATTEMPTS:
                self._end(record, "failed", problem(FaultError("the process that ran it was lost too often")))
            else:
                self.metrics.retried()
                record.state = "queued"
                self._turns.add(record, first=True)

    def _pump(self) -> None:
        """Start as many jobs as may run, users in turn."""
        if self._process is None or not self._process.ready or self._stopping:
            return
        while len(self._running) < self.limits.running_jobs:
            record = self._turns.next()
            if record is None:
                return
            self._running[record.id] = record
            record.attempts += 1
            record.begin_again()
            head = {
                "do": "start", "job": record.id, "user": record.user, "item": record.item,
                "folder": str(self.files(record).path),
            }  # fmt: skip
            self._aside(self._process.send(head))

    def _hear(self, head: Mapping[str, Any]) -> None:
        """News of a job."""
        record = self.records.get(head.get("job", ""))
        if record is None or record.final:
            return
        news = head["news"]
        if news == "planned":
            record.planned = True
            record.told.update({name: head[name] for name in ("samples", "shards", "bytes_out", "method", "explained")})
            self._aside(self._ledger.save(record))
        elif news == "event":
            self._event(record, {name: value for name, value in head.items() if name not in ("job", "news")})
        else:
            self._running.pop(record.id, None)
            self._end(record, news, head.get("problem"))
            self._pump()
        record.wake()

    def _event(self, record: Record, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "JobStarted" and record.state == "queued":
            record.state, record.told["started"] = "running", now()
            loop = asyncio.get_running_loop()
            late = lambda: self._aside(self.cancel(record, "time"))  # noqa: E731 - one line, used once
            record.timer = loop.call_later(self.limits.job_seconds, late)
            self._aside(self._ledger.save(record))
        elif kind == "ShardRetried":
            self.metrics.retried()
        record.follow(event)

    def _end(self, record: Record, state: State, found: dict[str, Any] | None) -> None:
        if record.cancelled_by == "time" and state != "done":
            error = JobError("job", f"must be computed within {self.limits.job_seconds:g} s", None, "ask for less work")
            state, found = "failed", problem(error)
        record.end(state, found)
        self.metrics.job_ended(state, now() - record.submitted)
        logger.info("job ended", extra={"job": record.id, "user": record.user, "state": state})
        self._aside(self._ledger.save(record))
        self._aside(self._prune(record.user))

    # Bookkeeping ------------------------------------------------------------------------------------------------

    def _enter(self, record: Record) -> None:
        self.records[record.id] = record
        self._keys[record.user, record.key] = record

    async def _forget(self, record: Record) -> None:
        self.records.pop(record.id, None)
        self._keys.pop((record.user, record.key), None)
        await self._ledger.forget(record)
        await asyncio.to_thread(shutil.rmtree, self.files(record).path, ignore_errors=True)

    async def forget_refused(self, record: Record) -> None:
        """A submission that was refused while it was planned leaves nothing behind."""
        await self._forget(record)

    async def _prune(self, user: str) -> None:
        """Keep a user's latest jobs only."""
        ended = [r for r in self.records.values() if r.user == user and r.final]
        for record in ended[: max(len(ended) - self.limits.kept_jobs, 0)]:
            await self._forget(record)

    def _aside(self, work: Any) -> None:
        """Do something without waiting for it."""
        task = asyncio.ensure_future(work)
        self._saving.add(task)
        task.add_done_callback(self._done_aside)

    def _done_aside(self, task: asyncio.Task[Any]) -> None:
        self._saving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, ProcessLostError):
            logger.error("something went wrong beside the requests", exc_info=error)


def _settle(folder: JobFolder, body: Body, spec: Mapping[str, Any] | None) -> None:
    folder.path.mkdir(parents=True)
    if spec is not None:
        folder.spec.write_text(json.dumps(spec), encoding="utf-8")
    if body.file is not None:
        body.file.replace(folder.body)


def _cancelled(record: Record) -> JobError:
    return JobError("job", "was cancelled", None, f"submit it again to compute it (it was job {record.id})")
