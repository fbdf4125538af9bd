"""Show how a job goes on: one bar on a terminal, sparse plain lines elsewhere. Only listens to the job's events."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jacray.events import Event, JobCancelled, JobDone, JobFailed, JobStarted, ShardDone, ShardRetried

if TYPE_CHECKING:
    from rich.console import Console

    from jacray.job import Job

# Without a terminal: a line at the start, at the end, at each retry, and at most this often in between.
LINE_SECONDS = 10.0


@contextlib.contextmanager
def progress(job: Job, console: Console | None = None, *, enabled: bool = True) -> Iterator[None]:
    """Show a job's progress while the block runs.

        with progress(job):
            result = job.result()

    Args:
        job: the job.
        console: where to; standard error by default, so that standard output stays the program's own.
        enabled: False shows nothing.
    """
    if not enabled:
        yield
        return
    from rich.console import Console as RichConsole

    console = console or RichConsole(stderr=True)
    shown = _Bar(console) if console.is_terminal else _Lines(console)
    with shown:
        job.listen(shown.hear)
        yield
        # A result is there a moment before its last event has been heard.
        shown.finished.wait(timeout=1)


@dataclass
class _Tally:
    """What has been heard so far."""

    samples: int = 0
    done: int = 0
    shards: int = 0
    shards_done: int = 0
    retries: int = 0
    began: float = 0.0

    def hear(self, event: Event) -> None:
        match event:
            case JobStarted():
                self.samples, self.shards, self.began = event.samples, event.shards, event.at
            case ShardDone():
                self.done, self.shards_done = self.done + event.samples, self.shards_done + 1
            case ShardRetried():
                self.retries += 1

    def rate(self, now: float) -> float:
        """Samples per second since the start."""
        return self.done / (now - self.began) if now > self.began else 0.0


@dataclass
class _Lines:
    """Plain lines, for logs."""

    console: Console
    tally: _Tally = field(default_factory=_Tally)
    finished: threading.Event = field(default_factory=threading.Event)
    _last: float = 0.0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def hear(self, event: Event) -> None:
        """Take an event from the job."""
        self.tally.hear(event)
        line = self._line(event)
        if line:
            self._last = event.at
            self.console.print(f"job {event.job}: {line}", highlight=False, soft_wrap=True)
        if isinstance(event, JobDone | JobFailed | JobCancelled):
            self.finished.set()

    def _line(self, event: Event) -> str:
        match event:
            case JobStarted():
                return f"{event.samples:,} samples in {event.shards:,} shards on {event.workers} workers"
            case ShardRetried():
                return f"shard {event.shard} is computed again: {event.reason}"
            case ShardDone() if event.at - self._last >= LINE_SECONDS:
                return self._standing(event.at)
            case JobDone():
                return f"done, {self._standing(event.at)}"
            case JobFailed():
                return f"failed, {self._standing(event.at)}"
            case JobCancelled():
                return f"cancelled, {self._standing(event.at)}"
        return ""

    def _standing(self, now: float) -> str:
        t = self.tally
        parts = [f"{t.done:,} of {t.samples:,} samples", f"{t.rate(now):,.0f} samples/s"]
        left = _left(t, now)
        if left is not None:
            parts.append(f"{left:.0f} s left")
        if t.retries:
            parts.append(f"{t.retries} retries")
        return ", ".join(parts)


class _Bar:
    """One bar with samples, rate, time left and retries."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.tally = _Tally()
        self.finished = threading.Event()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples {task.fields[rate]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[retries]}"),
            console=console,
        )
        self._task: Any = self._bar.add_task("waiting for workers", total=None, rate="", retries="")

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def hear(self, event: Event) -> None:
        """Take an event from the job."""
        self.tally.hear(event)
        t = self.tally
        match event:
            case JobStarted():
                self._bar.update(self._task, total=t.samples)
            case ShardDone():
                self._bar.update(
                    self._task, completed=t.done, description="computing", rate=f"{t.rate(event.at):,.0f}/s"
                )
            case ShardRetried():
                self._bar.update(self._task, retries=f"{t.retries} {'retry' if t.retries == 1 else 'retries'}")
            case JobDone() | JobFailed() | JobCancelled():
                word = {JobDone: "done", JobFailed: "failed", JobCancelled: "cancelled"}[type(event)]
                self._bar.update(self._task, description=word)
                self.finished.set()


def _left(tally: _Tally, now: float) -> float | None:
    """Seconds to the end at the rate so far; None at the start and at the end."""
    rate = tally.rate(now)
    return (tally.samples - tally.done) / rate if rate and tally.done < tally.samples else None
