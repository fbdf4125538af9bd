"""What a shard that is given up does to its job: ends it at once, ends it once the rest is kept, or leaves a gap."""

from __future__ import annotations

from typing import Literal, get_args

from jacray_workers.errors import JacrayError, Plain, RequestError, StorageError
from jacray_workers.plan import Plan

from jacray.executors.base import Failed, samples_of

OnError = Literal["fail", "skip"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
# So many shards given up and none done: the job is at fault, not the shards.
HOPELESS = 3
# How many further failures an error tells of.
_TOLD = 10


class Failures:
    """The shards of one job that were given up.

    Args:
        on_error: `fail` ends the job with the first error, after the other shards where these are kept for a
            resumption; `skip` goes on and leaves their samples out.
        keeps: whether finished shards are kept.
    """

    def __init__(self, on_error: OnError, *, keeps: bool) -> None:
        self._goes_on = on_error == "skip" or keeps
        self._skips = on_error == "skip"
        self._found: list[Failed] = []
        self._count = 0

    def add(self, failed: Failed, done: int) -> None:
        """Take a failure; `done` shards are done by now.

        Raises:
            Exception: its error, where going on is no use.
        """
        self._count += 1
        if self._count <= _TOLD + 1:
            self._found.append(failed)
        hopeless = done == 0 and self._count >= HOPELESS
        if isinstance(failed.error, StorageError) or not self._goes_on or hopeless:
            raise self._error()

    def finish(self, done: int) -> None:
        """The end of the job.

        Raises:
            Exception: the first error, unless failures are skipped and something else was computed.
        """
        if self._count and (not self._skips or done == 0):
            raise self._error()

    def _error(self) -> Exception:
        """The first error; the others as notes. A full disk goes before what it may have led to."""
        first = next((f for f in self._found if isinstance(f.error, StorageError)), self._found[0])
        others = [f for f in self._found if f is not first]
        for other in others[:_TOLD]:
            first.error.add_note(f"also failed: {samples_of(other.shard)} ({_told(other.error)})")
        if self._count - 1 > _TOLD:
            first.error.add_note(f"and {self._count - 1 - _TOLD} more shards")
        return first.error


def check_on_error(on_error: str, plan: Plan) -> None:
    """See whether failed samples can be left out of this plan's results.

    Raises:
        RequestError: they cannot, or the word is unknown.
    """
    if on_error not in ON_ERROR:
        raise RequestError("on_error", f"must be one of {', '.join(ON_ERROR)}", on_error)
    if on_error == "skip":
        sums = sorted({a.name for a in plan.arrays if a.axis < 0})
        if sums:
            rule = "skip needs results with a row per sample, to mark those that are missing"
            raise RequestError("on_error", rule, Plain(", ".join(sums)), "ask for these in a job of their own")


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, JacrayError) else f"{type(error).__name__}: {text}"
