"""What there is to count, in Prometheus' text format. The only file that imports its client."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one service."""

    media = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self._requests = self._counter("requests", "answers", "operation", "status")
        self._seconds = self._histogram("station_seconds", "seconds per station", _SECONDS, "station")
        self._bytes = self._counter("bytes", "bytes of bodies and answers", "direction")
        self._batch = self._histogram("batch_requests", "requests computed as one batch", _SIZES)
        self._cache = self._counter("cache", "prepared work found warm or not", "outcome")
        self._lost = self._counter("processes_lost", "compute processes that died or were ended", "reason")
        self._retries = self._counter("retries", "work done again")
        self._jobs = self._counter("jobs", "jobs by how they ended", "state")
        self._depth = self._gauge("queue_depth", "work that waits", "queue")
        self._ready = self._gauge("processes_ready", "compute processes that take work")
        self._busy = self._gauge("processes_busy", "compute processes that work")
        self._of = functools.lru_cache(maxsize=4096)(lambda counted, *labels: counted.labels(*labels))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"jacray_{name}", text, labels, registry=self._all)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"jacray_{name}", text, labels, registry=self._all)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"jacray_{name}", text, labels, buckets=buckets, registry=self._all)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._all)

    def answered(self, operation: str, status: int, size: int) -> None:
        """An answer was sent."""
        self._of(self._requests, operation, str(status)).inc()
        self._of(self._bytes, "out").inc(size)

    def served(self, station: str, seconds: float, size: int = 0) -> None:
        """A station took so long."""
        self._of(self._seconds, station).observe(seconds)
        if size:
            self._of(self._bytes, "in").inc(size)

    def batch(self, size: int, waited: float, facts: Mapping[str, Any]) -> None:
        """A batch of small work was computed."""
        self._batch.observe(size)
        self._seconds.labels("wait").observe(waited)
        self._seconds.labels("work").observe(facts["seconds"])
        self._cache.labels("hit").inc(facts["hits"])
        self._cache.labels("miss").inc(facts["misses"])

    def process_lost(self, reason: str) -> None:
        """A compute process died or was ended."""
        self._lost.labels(reason).inc()

    def retried(self) -> None:
        """A shard or a job is computed again."""
        self._retries.inc()

    def job_ended(self, state: str, seconds: float) -> None:
        """A job ended."""
        self._jobs.labels(state).inc()
        self._seconds.labels("job").observe(seconds)

    def look(self, waiting: int, ready: int, busy: int, jobs: int = 0) -> None:
        """Take note of how things stand now."""
        self._depth.labels("small").set(waiting)
        self._depth.labels("jobs").set(jobs)
        self._ready.set(ready)
        self._busy.set(busy)
