"""Who computes into a URL: an object that its holder renews, so that two coordinators never share one place.

A folder has its lock, which dies with its holder; an object store has none. Whoever wants a place announces itself
there with an object of its own name and then looks who else did, so that of two who come at once at least one sees
the other; who sees another withdraws. That rests on nothing but a listing that shows what was written before, as S3,
GCS, Azure and file systems have it; not every store, nor every layer above one, can create an object exclusively.

A holder counts on every few seconds. No clock is compared with another: whoever finds a lease watches it by its own
clock, and takes it over once it has been silent for `SILENT` seconds, or at once where its process was one of this
machine and is gone. A holder that was only asleep finds itself taken over at its next beat, and its job ends: until
then both write the same bytes, since another job is refused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import random
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from jacray_workers.errors import JobError, Plain

from jacray.store.faults import writing
from jacray.target import Target

logger = logging.getLogger(__name__)

BEAT = 3.0
"""Seconds between two signs of life."""
SILENT = 30.0
"""After how many seconds without one a lease is taken over."""
_TRIES = 10
_PREFIX, _SUFFIX = "lease-", ".json"
_AGE = 5.0  # a process's age is not told to the second


@dataclass(frozen=True)
class Holder:
    """Who computes into a place, or is about to.

    Attributes:
        owner: a name drawn anew for each lease.
        host, pid: the process.
        born: when that process began, in seconds since the epoch.
        machine: what tells one system of processes from another; empty where nothing does.
        since, at: when it came and when it last gave a sign, by its own clock; for people only.
        beats: how many signs it has given; -1 where its object could not be read.
        holds: whether it holds the place, and does not only ask.
        over: whom it took the place from.
    """

    owner: str
    host: str = "an unknown machine"
    pid: int = 0
    born: float = 0.0
    machine: str = ""
    since: float = 0.0
    at: float = 0.0
    beats: int = -1
    holds: bool = True
    over: Sequence[str] = field(default=())

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"

    @property
    def lives(self) -> bool | None:
        """Whether its process is there; None where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.born) < _AGE)
        except psutil.Error:
            return False


class UrlLease:
    """A place behind a URL, held from now until it is closed.

    Args:
        target: the place.

    Raises:
        JobError: somebody else computes into it; names who, and says how to go on.
        StorageError: nothing can be written there.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._me = _take(target)
        self._lost: Holder | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="jacray-lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether it was taken away."""
        return self._lost is not None

    def check(self) -> None:
        """Look whether the place is still ours, as of the last beat.

        Raises:
            JobError: somebody else took it over.
        """
        if self._lost is not None:
            told = "lost its lease" if self._lost == self._me else f"was taken over by {self._lost}"
            way_out = "this job ends here; what is finished is kept, and the same job goes on from there"
            raise JobError("to", told, Plain(self.target.url), way_out)

    def close(self) -> None:
        """Let go of the place. Later calls do nothing."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            with contextlib.suppress(Exception):  # the store is out of reach: then it is found silent later
                _remove(self.target, self._me.owner)

    def _keep(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._beat()
            except Exception as error:  # noqa: BLE001  (a store out of reach may come back before anybody takes over)
                logger.debug("no sign of life could be given at %s: %s", self.target.url, error)
            if self.lost:
                return

    def _beat(self) -> None:
        found = holders(self.target)
        mine = self._me.owner
        by = next((h for h in found if mine in h.over), None)
        if by is not None or all(h.owner != mine for h in found):
            self._lost = by or next((h for h in found if h.holds and h.owner != mine), self._me)
            return
        self._me = replace(self._me, beats=self._me.beats + 1, at=time.time())
        _write(self.target, self._me)
        for risen in (h for h in found if h.owner in self._me.over):  # wrote once more before it saw that it is out
            _remove(self.target, risen.owner)


def holders(target: Target) -> list[Holder]:
    """Everybody who holds a place behind a URL or asks for it, those who may be gone included."""
    names = [name for name in target.names() if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    found = [_read(target, name) for name in names]
    return [holder for holder in found if holder is not None]


def busy(target: Target) -> Holder | None:
    """Who holds a place behind a URL as far as can be seen from here at once; None where certainly nobody does."""
    return next((h for h in holders(target) if h.holds and h.lives is not False), None)


def is_lease(name: str) -> bool:
    """Whether a file beside the results is a lease."""
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _take(target: Target) -> Holder:
    now = time.time()
    process = psutil.Process()
    me = Holder(
        uuid.uuid4().hex[:16], socket.gethostname(), process.pid, process.create_time(), _machine(), now, now,
        beats=0, holds=False,
    )  # fmt: skip
    with writing(target):
        for _ in range(_TRIES):
            gone = _gone(target)
            _write(target, me)
            found = {h.owner for h in holders(target)}
            if me.owner in found and found <= {me.owner, *gone}:
                me = replace(me, holds=True, beats=1, over=sorted(gone))
                _write(target, me)
                for owner in gone:
                    _remove(target, owner)
                return me
            _remove(target, me.owner)
            time.sleep(random.uniform(0.05, 0.5))  # noqa: S311  (so that two who came at once do not do so again)
    raise JobError("to", "is wanted by several jobs at once", Plain(target.url), "start one of them after the other")


def _gone(target: Target) -> set[str]:
    """The owners who are no more; waits until that is clear of everybody.

    Raises:
        JobError: one of them lives.
    """
    first: dict[str, tuple[Holder, float]] = {}
    while True:
        now, found = time.monotonic(), holders(target)
        gone = {h.owner for h in found if h.lives is False}
        for holder in (h for h in found if h.owner not in gone):
            if holder.owner not in first:
                _tell_of_waiting(target, holder)
            known, seen = first.setdefault(holder.owner, (holder, now))
            if holder.holds and (holder.lives or holder.beats != known.beats):
                raise _held(target, holder)
            if now - seen > SILENT:
                gone.add(holder.owner)
        if {h.owner for h in found} <= gone:
            return gone
        time.sleep(BEAT / 4)


def _tell_of_waiting(target: Target, holder: Holder) -> None:
    if holder.holds and not holder.lives:
        told = "%s was held by %s; waiting for a sign of life, for %g s at most"
        logger.warning(told, target.url, holder, SILENT)


def _held(target: Target, holder: Holder) -> JobError:
    rule = (
        f"is being computed into by {holder}, since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(holder.since))}"
    )
    way_out = (
        f"wait for it, or end it there: a place that has been silent for {SILENT:g} s is taken over by the next job "
        f"(to take it away at once, remove {_name(holder.owner)} there: its job then ends within {BEAT:g} s of a shard)"
    )
    return JobError("to", rule, Plain(target.url), way_out)


def _name(owner: str) -> str:
    return f"{_PREFIX}{owner}{_SUFFIX}"


def _write(target: Target, holder: Holder) -> None:
    target.write(_name(holder.owner), json.dumps(asdict(holder)) + "\n")


def _read(target: Target, name: str) -> Holder | None:
    text = target.read(name)
    if text is None:
        return None
    owner = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    try:
        return replace(Holder(**json.loads(text)), owner=owner)
    except (TypeError, ValueError):  # being written, or of another version: it counts as somebody until it is silent
        return Holder(owner)


def _remove(target: Target, owner: str) -> None:
    target.remove(_name(owner))


@functools.cache
def _machine() -> str:
    """This system of processes: the machine since it was started, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
