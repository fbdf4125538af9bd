"""What happens to a job, as a stream of values. The status, the progress bar and a log only listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        job: the job's id.
        at: when, in seconds of a clock that never goes back; differences mean something, the value does not.
    """

    job: str
    at: float


@dataclass(frozen=True)
class JobStarted(Event):
    """The first shard was handed out.

    Attributes:
        samples: how many samples the job has.
        shards: how many shards.
        workers: how many workers share them.
    """

    samples: int
    shards: int
    workers: int


@dataclass(frozen=True)
class ShardDone(Event):
    """A shard's blocks have arrived.

    Attributes:
        shard: which.
        samples: how many samples it held.
        seconds: how long its worker computed.
        worker: which worker computed it.
    """

    shard: int
    samples: int
    seconds: float
    worker: str


@dataclass(frozen=True)
class ShardsKept(Event):
    """Shards that an earlier run of the same job computed, and that need not be computed again.

    Attributes:
        shards: how many.
        samples: how many samples they hold.
    """

    shards: int
    samples: int


@dataclass(frozen=True)
class ShardRetried(Event):
    """A shard was lost with its worker, or raised, and will be computed again.

    Attributes:
        shard: which.
        attempt: how often it was tried so far.
        reason: why it was lost.
    """

    shard: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class ShardFailed(Event):
    """A shard is given up.

    Attributes:
        shard: which.
        start, stop: its samples, half open.
        attempt: how often it was tried.
        error: the error's text.
    """

    shard: int
    start: int
    stop: int
    attempt: int
    error: str


@dataclass(frozen=True)
class Totals(Event):
    """What events between the start and the next one came to, where these are too many to be kept.

    Attributes:
        samples_done, shards_done, retries, shards_failed: so far in all.
    """

    samples_done: int = 0
    shards_done: int = 0
    retries: int = 0
    shards_failed: int = 0

    def after(self, event: Event) -> Totals:
        """The sum with one more event."""
        samples, shards, retries, failed = self.samples_done, self.shards_done, self.retries, self.shards_failed
        match event:
            case ShardDone():
                samples, shards = samples + event.samples, shards + 1
            case ShardsKept():
                samples, shards = samples + event.samples, shards + event.shards
            case ShardRetried():
                retries += 1
            case ShardFailed():
                failed += 1
        return Totals(self.job, event.at, samples, shards, retries, failed)


@dataclass(frozen=True)
class JobDone(Event):
    """Every shard is done and the result is whole."""


@dataclass(frozen=True)
class JobFailed(Event):
    """The job ended with an error.

    Attributes:
        error: the error's text.
    """

    error: str


@dataclass(frozen=True)
class JobCancelled(Event):
    """The job was cancelled."""


Listener = Callable[[Event], None]
