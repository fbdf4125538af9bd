"""Show how a job goes on: one bar on a terminal, sparse lines of JSON elsewhere. Only listens to the job's events."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from jacray.events import (
    Event,
    JobCancelled,
    JobDone,
    JobFailed,
    JobStarted,
    ShardDone,
    ShardFailed,
    ShardRetried,
    ShardsKept,
    Totals,
)

if TYPE_CHECKING:
    from rich.console import Console

    from jacray.job import Job

# Without a terminal: a line at the start, at the end, at each retry, and at most this often in between.
LINE_SECONDS = 10.0
# A worker that keeps dying must not fill a log.
MOST_RETRY_LINES = 100
Style = Literal["auto", "bar", "json", "lines", "off"]
STYLES: tuple[Style, ...] = get_args(Style)


@contextlib.contextmanager
def progress(job: Job, console: Console | None = None, *, style: Style = "auto") -> Iterator[None]:
    """Show a job's progress while the block runs.

        with progress(job):
            result = job.result()

    Args:
        job: the job.
        console: where to; standard error by default, so that standard output stays the program's own.
        style: `bar` for people, `json` for programs (an object a line), `lines` for logs that people read, `off` for
            nothing; `auto` is `bar` on a terminal and `json` elsewhere.
    """
    if style == "off":
        yield
        return
    from rich.console import Console as RichConsole

    console = console or RichConsole(stderr=True)
    chosen = ("bar" if console.is_terminal else "json") if style == "auto" else style
    shown = _Bar(console) if chosen == "bar" else _Lines(console, _as_json if chosen == "json" else _in_words)
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
    kept: int = 0
    retries: int = 0
    failed: int = 0
    workers: int = 0
    began: float = 0.0

    def hear(self, event: Event) -> None:
        match event:
            case JobStarted():
                self.samples, self.shards, self.began = event.samples, event.shards, event.at
                self.workers = event.workers
            case ShardDone():
                self.done, self.shards_done = self.done + event.samples, self.shards_done + 1
            case ShardsKept():
                self.done, self.shards_done, self.kept = self.done + event.samples, event.shards, event.samples
            case ShardRetried():
                self.retries += 1
            case ShardFailed():
                self.failed += 1
            case Totals():
                self.done, self.shards_done = event.samples_done, event.shards_done
                self.retries, self.failed = event.retries, event.shards_failed

    def rate(self, now: float) -> float:
        """Samples per second since the start, without those that were there before."""
        return (self.done - self.kept) / (now - self.began) if now > self.began else 0.0


@dataclass
class _Lines:
    """A line now and then."""

    console: Console
    put: Put
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
        if self._worth_a_line(event):
            self._last = event.at
            line = self.put(event, self.tally)
            self.console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)
        if isinstance(event, JobDone | JobFailed | JobCancelled):
            self.finished.set()

    def _worth_a_line(self, event: Event) -> bool:
        match event:
            case ShardDone():
                return event.at - self._last >= LINE_SECONDS
            case ShardRetried():
                return self.tally.retries <= MOST_RETRY_LINES
            case ShardFailed():
                return self.tally.failed <= MOST_RETRY_LINES
        return not isinstance(event, Totals)


def _as_json(event: Event, t: _Tally) -> str:
    """One event and how the job stands, as one JSON object."""
    names = {
        JobStarted: "started", ShardsKept: "kept", ShardDone: "running", ShardRetried: "retried",
        ShardFailed: "shard_failed", JobDone: "done", JobFailed: "failed", JobCancelled: "cancelled",
    }  # fmt: skip
    told: dict[str, Any] = {
        "event": names[type(event)], "job": event.job, "seconds": round(event.at - t.began, 3) if t.began else 0.0,
        "samples_done": t.done, "samples": t.samples, "shards_done": t.shards_done, "shards": t.shards,
        "samples_per_second": round(t.rate(event.at), 3), "seconds_left": _rounded(_left(t, event.at)),
        "retries": t.retries, "shards_failed": t.failed,
    }  # fmt: skip
    match event:
        case JobStarted():
            told["workers"] = event.workers
        case ShardRetried():
            told |= {"shard": event.shard, "attempt": event.attempt, "reason": event.reason}
        case ShardFailed():
            told |= {"shard": event.shard, "start": event.start, "stop": event.stop, "error": event.error}
        case JobFailed():
            told["error"] = event.error
    return json.dumps(told)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _in_words(event: Event, t: _Tally) -> str:
    return f"job {event.job}: {_words(event, t)}"


def _words(event: Event, t: _Tally) -> str:
    match event:
        case JobStarted():
            return f"{event.samples:,} samples in {event.shards:,} shards on {event.workers} workers"
        case ShardsKept():
            return f"{event.shards:,} shards ({event.samples:,} samples) were finished before and are kept"
        case ShardRetried():
            return f"shard {event.shard} is computed again: {event.reason}"
        case ShardFailed():
            return f"samples {event.start} to {event.stop - 1} failed: {event.error}"
        case JobDone():
            return f"done, {_standing(t, event.at)}"
        case JobFailed():
            return f"failed, {_standing(t, event.at)}"
        case JobCancelled():
            return f"cancelled, {_standing(t, event.at)}"
    return _standing(t, event.at)


def _standing(t: _Tally, now: float) -> str:
    parts = [f"{t.done:,} of {t.samples:,} samples", f"{t.rate(now):,.0f} samples/s"]
    left = _left(t, now)
    if left is not None:
        parts.append(f"{left:.0f} s left")
    return ", ".join([*parts, *_troubles(t)])


def _troubles(t: _Tally) -> list[str]:
    counts = ((t.retries, "retry", "retries"), (t.failed, "shard failed", "shards failed"))
    return [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]


Put = Callable[[Event, _Tally], str]


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
            TextColumn("{task.fields[troubles]}"),
            console=console,
        )
        self._task: Any = self._bar.add_task("waiting for workers", total=None, rate="", troubles="")

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
                self._bar.update(self._task, total=t.samples, description="computing")
            case ShardsKept():
                self._bar.update(self._task, completed=t.done)
            case ShardDone():
                self._bar.update(self._task, completed=t.done, rate=f"{t.rate(event.at):,.0f}/s")
            case ShardRetried() | ShardFailed():
                self._bar.update(self._task, troubles=", ".join(_troubles(t)))
            case Totals():
                self._bar.update(self._task, completed=t.done, troubles=", ".join(_troubles(t)))
            case JobDone() | JobFailed() | JobCancelled():
                word = {JobDone: "done", JobFailed: "failed", JobCancelled: "cancelled"}[type(event)]
                self._bar.update(self._task, description=word)
                self.finished.set()


def _left(tally: _Tally, now: float) -> float | None:
    """Seconds to the end at the rate so far; None at the start and at the end."""
    rate = tally.rate(now)
    return (tally.samples - tally.done) / rate if rate and tally.done < tally.samples else None
