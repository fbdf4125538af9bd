"""Shards on Ray actors. The only file of the project that imports Ray."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, cast

import ray
from jacray_workers.errors import RequestError, ShardError
from jacray_workers.plan import Shard
from ray import exceptions as rx

from jacray.executors.base import Into, Payload, Step, Task
from jacray.executors.dispatch import Dispatch
from jacray.executors.guard import Guard, agents
from jacray.executors.lease import Lease, Line
from jacray.executors.options import WorkerOptions
from jacray.executors.pool import Seat, Slot, WorkerLostError
from jacray.executors.surroundings import environment, knock, same_versions, server_environment, worker_environment
from jacray.executors.worker import Reply, Worker
from jacray.transport import unpack

logger = logging.getLogger(__name__)

# A worker that dies this often in a row before it ever answers is given up.
FALSE_STARTS = 3
# How long to wait for a first worker; a cloud's autoscaler takes minutes.
START_SECONDS = 600.0
# The reply of a lost worker, or one whose machine took it along.
_LOST = (rx.RayActorError, rx.WorkerCrashedError, rx.ObjectLostError, rx.NodeDiedError, rx.OutOfMemoryError)
_guards: list[Guard] = []


class RayExecutor:
    """Computes on actors of a Ray cluster, or of a Ray started for this process."""

    name = "ray"

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.workers = options.workers
        self.threads = options.threads
        self.device = "auto" if options.gpus else "cpu"
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._pool: _Pool | None = None
        self._dispatch: Dispatch | None = None
        self._closed = False

    def begin(self) -> None:
        """Start Ray and the workers without waiting for them. What goes wrong is raised by `keep`."""

        def ahead() -> None:
            with contextlib.suppress(Exception):
                self._start()

        threading.Thread(target=ahead, name="jacray-begin", daemon=True).start()

    def keep(self, job: str, payload: Payload) -> Task:
        """Put the work into the object store; each worker takes it from there once."""
        self._start()
        packed = payload.pack(copy=False)
        return Task(job, payload.plan, ray.put(packed), payload.target)

    def run(self, task: Task, into: Into) -> Iterator[Step]:
        """Compute the shards on whichever workers are free."""
        del into  # workers share no memory with the caller
        if self._dispatch is None:
            raise ShardError("the client was closed while its job ran")
        return self._dispatch.steps(task)

    def scale(self, workers: int) -> None:
        """Ask for more workers, or let some go; while jobs run, too."""
        with self._lock:
            if self._pool is not None:
                self._check_there(workers)
                self._pool.scale(workers)
            self.workers = workers

    def cancel(self, task: Task) -> None:
        """Ask the workers to end the task; one that does not within a second is replaced."""
        task.cancelled.set()
        if self._pool is not None:
            self._pool.cancel(task)

    def drop(self, task: Task) -> None:
        """Let workers and object store forget the task."""
        task.held = None
        if self._pool is not None:
            self._pool.drop(task)

    def close(self) -> None:
        """End the workers; shut Ray down if it was started for this process and nobody else uses it."""
        with self._lock:
            self._closed = True
            pool, self._pool, self._dispatch = self._pool, None, None
            lease, self._lease = self._lease, None
        if pool is not None:
            pool.close()
        if lease is not None:
            lease.give_back()

    def _start(self) -> None:
        """Wait until Ray is there, and ask it for the workers, once."""
        with self._lock:
            if self._closed:
                raise ShardError("the client is closed")
            if self._lease is None:
                self._lease = Lease.take(self.options, Line(_connect, _disconnect, ray.is_initialized))
            self._lease.wait()
            if self._pool is None:
                self._check_there(self.workers)
                self._pool = _Pool(self.workers, self._asked(), self.threads)
                self._dispatch = Dispatch(self._pool)

    @property
    def _owned(self) -> bool:
        return self._lease is not None and self._lease.owned

    def _check_there(self, workers: int) -> None:
        """A Ray of our own grows no more GPUs and has no resources but what a machine has; a cluster may yet."""
        if self._owned:
            self.options.check_there(workers, _resources())

    def _asked(self) -> dict[str, Any]:
        """How an actor is asked for. A Ray of our own counts no CPUs, so that any number of clients can share it."""
        asked: dict[str, Any] = {
            "num_cpus": 0 if self._owned else self.options.cpus, "num_gpus": self.options.gpus,
            "resources": dict(self.options.resources), "max_restarts": 0,
        }  # fmt: skip
        if not self._owned:
            asked["runtime_env"] = {"env_vars": worker_environment(search_path=not self.options.runtime_env)}
        return asked


class _Pool:
    """The actors of one client.

    A dead actor is replaced here and not by Ray: Ray's own restarts would run cancelled shards again, hide retries,
    and keep work waiting for one actor while another is free. An actor that the cluster has no room for yet is asked
    for all the same, and joins when a node does.
    """

    def __init__(self, workers: int, asked: dict[str, Any], threads: int) -> None:
        self._asked, self._threads = asked, threads
        # The second group is a thread of its own, so that a cancel is heard while a shard is computed.
        self._class = cast("Any", ray.remote)(concurrency_groups={"control": 1})(Worker)
        self._lock = threading.RLock()
        self._empty_since = time.monotonic()
        self._last_words = ""
        self._slots: dict[int, Slot] = {}
        self._homes: dict[Hashable, Slot] = {}
        self._places = itertools.count()
        self.scale(workers)

    def scale(self, workers: int) -> None:
        """Hire, or let the last ones go once they have done what they have."""
        with self._lock:
            staying = [slot for slot in self._slots.values() if not slot.leaving]
            for _ in range(workers - len(staying)):
                place = next(self._places)
                self._slots[place] = Slot(place, *self._hire())
            for slot in staying[workers:]:
                slot.leaving = True
                self._let_go(slot)

    def seats(self) -> Sequence[Seat]:
        """The workers that have answered."""
        if not ray.is_initialized():
            raise ShardError("Ray was shut down while a job ran")
        with self._lock:
            staying = [slot for slot in self._slots.values() if not slot.leaving]
            found = [slot.seat for slot in staying if slot.ready]
        now = time.monotonic()
        if found:
            self._empty_since = now
        elif all(slot.false_starts >= FALSE_STARTS for slot in staying):
            raise ShardError(f"no worker could be started; the last one said: {self._last_words}")
        elif now - self._empty_since > START_SECONDS:
            raise ShardError(
                f"no worker could be started in {START_SECONDS:.0f} s: {len(staying)} were asked for with "
                f"{self._asked['num_cpus']:g} CPUs, {self._asked['num_gpus']:g} GPUs and "
                f"{self._asked['resources'] or 'nothing'} else each; the cluster has {_resources()}"
            )
        return found

    def submit(self, seat: Seat, task: Task, shard: Shard, halvings: int) -> Hashable:
        """Queue a shard; the task's data go ahead of its first one."""
        with self._lock:
            slot = self._slots[seat.place]
            if task.id not in slot.opened:
                slot.actor.open.remote(task.id, task.held)
                slot.opened.add(task.id)
            ticket = slot.actor.compute.remote(task.id, shard, halvings)
            slot.tickets.add(ticket)
            self._homes[ticket] = slot
            return cast("Hashable", ticket)

    def wait(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        """Wait for a reply, or for a worker's first word."""
        with self._lock:
            greetings = {slot.greeting: slot for slot in self._slots.values() if not slot.ready and self._hopeful(slot)}
        refs = [*tickets, *greetings]
        if not refs:
            time.sleep(seconds)
            return []
        answered, _ = ray.wait(refs, num_returns=1, timeout=seconds)
        for ref in answered:
            if ref in greetings:
                self._settle(greetings[ref], ref)
        return [ref for ref in answered if ref not in greetings]

    def fetch(self, ticket: Hashable) -> Reply:
        """Unpack a reply; blocks that are copied into place later stay where they lie until then."""
        try:
            return cast("Reply", unpack(ray.get(cast("Any", ticket))))
        except _LOST as error:
            killed = "ray.kill" in str(error)
            reason = "the worker was ended" if killed else f"the worker died ({type(error).__name__})"
            memory = isinstance(error, rx.OutOfMemoryError)
            raise WorkerLostError(reason, blame=not killed, memory=memory) from None
        finally:
            self._answered(ticket)

    def cancel(self, task: Task) -> None:
        """Tell every worker that has the task."""
        self._tell(task, "cancel")

    def drop(self, task: Task) -> None:
        """Tell every worker that had the task."""
        self._tell(task, "drop")
        with self._lock:
            for slot in self._slots.values():
                slot.opened.discard(task.id)

    def replace(self, seat: Seat, *, blame: bool) -> None:
        """Put a new actor in this seat, unless that was done before or the seat is given up."""
        with self._lock:
            slot = self._slots.get(seat.place)
            if slot is None or slot.seat != seat:
                return
            if blame:
                logger.info("%s died and is replaced", seat)
            if slot.leaving:
                self._forget(slot)
                self._let_go(slot)
            else:
                self._rehire(slot)

    def close(self) -> None:
        """End every actor."""
        with self._lock:
            for slot in self._slots.values():
                self._end(slot)

    def _answered(self, ticket: Hashable) -> None:
        with self._lock:
            slot = self._homes.pop(ticket, None)
            if slot is not None:
                slot.tickets.discard(ticket)
                self._let_go(slot)

    def _let_go(self, slot: Slot) -> None:
        """End an actor that is to leave, once it has nothing left to do."""
        if slot.leaving and not slot.tickets and self._slots.get(slot.place) is slot:
            del self._slots[slot.place]
            self._end(slot)

    def _forget(self, slot: Slot) -> None:
        for ticket in slot.tickets:
            self._homes.pop(ticket, None)
        slot.tickets = set()

    def _tell(self, task: Task, what: str) -> None:
        with self._lock, contextlib.suppress(Exception):
            for slot in self._slots.values() if ray.is_initialized() else ():
                if task.id in slot.opened:
                    getattr(slot.actor, what).options(concurrency_group="control").remote(task.id)

    def _hire(self) -> tuple[Any, Any]:
        """A new actor, and the reference to its first word."""
        actor = self._class.options(**self._asked).remote(self._threads)
        return actor, actor.ready.remote()

    def _rehire(self, slot: Slot) -> None:
        self._end(slot)
        self._forget(slot)
        slot.actor, slot.greeting = self._hire()
        slot.generation, slot.ready, slot.opened = slot.generation + 1, False, set()

    def _end(self, slot: Slot) -> None:
        # Without a Ray there is nothing left to end, and the call would start one.
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.kill(slot.actor)

    def _hopeful(self, slot: Slot) -> bool:
        return slot.false_starts < FALSE_STARTS

    def _settle(self, slot: Slot, greeting: Any) -> None:
        """Take note of a worker's first word, or of its death before it."""
        try:
            facts = ray.get(greeting)
        except rx.RayError as error:
            with self._lock:
                self._last_words = str(error).strip()
                if slot.greeting == greeting:
                    slot.false_starts += 1
                    if self._hopeful(slot):
                        self._rehire(slot)
            return
        same_versions(facts["versions"])
        with self._lock:
            if slot.greeting == greeting:
                slot.ready, slot.false_starts = True, 0


def _connect(options: WorkerOptions) -> None:
    address = options.address
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _hush()
    if address == "local":
        # Workers inherit the environment, so those that Ray starts ahead can be used at once.
        with environment({**worker_environment(), **server_environment()}):
            ray.init(address="local", num_cpus=options.workers, include_dashboard=False, **quiet)
        _guards.append(Guard(agents()))
        return
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named not in ("", "auto", "local"):
        knock(named)
    try:
        ray.init(address=address, runtime_env=dict(options.runtime_env) or None, **quiet)
    except (ConnectionError, ValueError) as error:
        way_out = (
            "start one with `ray start --head`, or leave the address at local; if it asks for a token, "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )
        if "ray[client]" in str(error):
            way_out = "install Ray's client first: pip install 'ray[client]'"
        raise RequestError("address", "must lead to a running Ray cluster", address, way_out) from error


def _disconnect() -> None:
    ray.shutdown()
    while _guards:
        _guards.pop().let_go()


def _hush() -> None:
    """Keep Ray from printing a worker's death on the caller's standard output; it is an event of the job.

    `log_to_driver=False` does not cover these messages and there is no setting that does.
    """
    inside: Any = ray._private.worker
    if hasattr(inside, "print_to_stdstream"):
        inside.print_to_stdstream = _log_instead


def _resources() -> dict[str, float]:
    return cast("dict[str, float]", cast("Any", ray.cluster_resources)())


def _log_instead(data: dict[str, Any], **_: Any) -> None:
    for line in data.get("lines", ()):
        logger.debug("%s: %s", data.get("pid"), line)
