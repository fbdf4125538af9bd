"""What a journal holds: jobs and shards, as frozen data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
ShardState = Literal["done", "again", "failed"]


@dataclass(frozen=True)
class JobRow:
    """A job as the journal knows it.

    Attributes:
        id: the job's id.
        digests: of everything that decides its numbers, by what it is (`model`, `inputs`, `request`, ...).
        plan, plan_digest: how it is computed, as plain data, and the plan's digest.
        samples, shards: how many.
        key: the idempotency key that it was submitted with, or None.
        state: `queued`, `running`, `done`, `failed` or `cancelled`. A job that its process left `running` was
            interrupted: see `Journal.alone`.
        user: whose it is.
        spec: what its owner wants to find again, as plain data.
        created, began, ended: seconds since the epoch; None before it happens.
        error, trace: why it failed, and the traceback.
    """

    id: str
    digests: Mapping[str, str]
    plan: Mapping[str, Any]
    plan_digest: str
    samples: int
    shards: int
    key: str | None = None
    state: JobState = "queued"
    user: str = ""
    spec: Any = None
    created: float = field(default_factory=time.time)
    began: float | None = None
    ended: float | None = None
    error: str = ""
    trace: str = ""


@dataclass(frozen=True)
class ShardRow:
    """A shard as the journal knows it: the last that happened to it.

    Attributes:
        shard: its index.
        state: `done`, `again` (it went wrong and is to be tried again) or `failed` (given up).
        attempt: the how manieth time that was, from 1.
        worker: who tried it.
        at: when, in seconds since the epoch.
        seconds: how long it took.
        detail: of a shard that is done: what it left, its checks and facts, as plain data.
        error, trace: why it went wrong, and the traceback.
    """

    shard: int
    state: ShardState
    attempt: int = 1
    worker: str = ""
    at: float = field(default_factory=time.time)
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Counts:
    """A job's shards by state, and how many times one was tried beyond the first."""

    done: int = 0
    again: int = 0
    failed: int = 0
    retries: int = 0


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two jobs, as `KEY was OLD and is NEW`."""
    names = dict.fromkeys([*before, *now])
    return [
        f"{name} was {before.get(name, 'absent')[:16]} and is {now.get(name, 'absent')[:16]}"
        for name in names
        if before.get(name) != now.get(name)
    ]
