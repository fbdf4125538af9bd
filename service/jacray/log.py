"""A job's events, in memory that does not grow with the job: the latest as they were, those before as a sum."""

from __future__ import annotations

import collections

from jacray.events import Event, JobStarted, Totals

# Enough that a reader who keeps up never meets the sum, few enough that a service can keep many jobs.
MOST = 4096


class EventLog:
    """The events of one job.

    Args:
        job: the job's id.
        most: how many events are kept as they were.
    """

    def __init__(self, job: str, most: int = MOST) -> None:
        self.total = Totals(job, 0.0)
        self._most = most
        self._kept: collections.deque[Event] = collections.deque()
        self._dropped = 0
        self._start: JobStarted | None = None
        self._sum = Totals(job, 0.0)

    def __len__(self) -> int:
        """How many events there have been."""
        return self._dropped + len(self._kept)

    def append(self, event: Event) -> None:
        """Take an event."""
        self.total = self.total.after(event)
        self._kept.append(event)
        if len(self._kept) > self._most:
            first = self._kept.popleft()
            self._dropped += 1
            self._sum = self._sum.after(first)
            if isinstance(first, JobStarted):
                self._start = first

    def since(self, read: int) -> list[Event]:
        """What has happened after the first `read` events.

        Where some of these are no longer kept, a `Totals` with the totals up to the next one stands for them, behind
        the start for a reader that has not had that.
        """
        if read >= self._dropped:
            return [self._kept[i] for i in range(read - self._dropped, len(self._kept))]
        head: list[Event] = [self._start] if read == 0 and self._start is not None else []
        return [*head, self._sum, *self._kept]
