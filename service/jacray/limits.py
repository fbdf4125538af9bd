"""How much work a client takes on before it says no."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from jacray_workers.errors import BusyError, Plain
from jacray_workers.planning.explain import size


def _half_the_memory() -> int:
    return int(psutil.virtual_memory().total) // 2


@dataclass(frozen=True)
class Limits:
    """What may be queued and running at a time.

    Attributes:
        jobs: how many jobs.
        shards: how many shards in all of them.
        nbytes: bytes of their models and inputs; half of this machine's memory by default.
    """

    jobs: int = 1000
    shards: int = 10_000_000
    nbytes: int = field(default_factory=_half_the_memory)


@dataclass(frozen=True)
class Load:
    """What one job, or all of them, put on a client."""

    jobs: int = 0
    shards: int = 0
    nbytes: int = 0

    def plus(self, other: Load, sign: int = 1) -> Load:
        """Both together, or one without the other."""
        return Load(self.jobs + sign * other.jobs, self.shards + sign * other.shards, self.nbytes + sign * other.nbytes)


class Door:
    """Lets jobs in while there is room. Safe to use from several threads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.load = Load()
        self._lock = threading.Lock()

    def enter(self, load: Load) -> None:
        """Take a job's load on.

        Raises:
            BusyError: there is no room; names the limit and what is there.
        """
        with self._lock:
            wanted = self.load.plus(load)
            for name, what, show in (("jobs", "jobs", str), ("shards", "shards", str), ("nbytes", "bytes", size)):
                most, now = getattr(self.limits, name), getattr(self.load, name)
                if getattr(wanted, name) > most:
                    raise BusyError(
                        f"limits.{name}",
                        f"at most {show(most)} {what} may be queued and running at a time",
                        Plain(f"{show(getattr(load, name))} more with {show(now)} there"),
                        "wait until some have ended, or raise the limit",
                    )
            self.load = wanted

    def leave(self, load: Load) -> None:
        """Take a job's load off."""
        with self._lock:
            self.load = self.load.plus(load, -1)

    @contextmanager
    def trying(self, load: Load) -> Iterator[Load]:
        """Take a load on; off again if the block raises."""
        self.enter(load)
        try:
            yield load
        except BaseException:
            self.leave(load)
            raise
