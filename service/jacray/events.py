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
class ShardRetried(Event):
    """A shard was lost with its worker and will be computed again.

    Attributes:
        shard: which.
        attempt: how often it was tried so far.
        reason: why it was lost.
    """

    shard: int
    attempt: int
    reason: str


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
