"""Submit jobs to an executor: this process, a local Ray or a cluster."""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, Unpack, cast

from jacray_workers.engine import Prepared, prepare
from jacray_workers.errors import JobError, StorageError
from jacray_workers.models import as_model
from jacray_workers.plan import Plan
from jacray_workers.request import Request, make_request
from jacray_workers.sources.ranged import Rows
from torch.utils import _pytree as pytree

from jacray.books import Books, open_books
from jacray.coordinator import drive
from jacray.digests import digests
from jacray.entries import differing
from jacray.executors import make_executor
from jacray.executors.base import Payload, Task
from jacray.executors.options import WorkerOptions, check_workers
from jacray.executors.threads import torch_threads
from jacray.failures import OnError, check_on_error
from jacray.fields import AllFields
from jacray.job import Job
from jacray.limits import Door, Limits, Load
from jacray.orders import Order, check_shards, in_units, loaded, pace
from jacray.outcome import begin_store
from jacray.receipt import Ledger
from jacray.result import Result
from jacray.target import Target, as_target


class Client:
    """Where jobs are submitted. A context manager; several jobs share its workers.

    Leaving the `with` block waits for the jobs that still run, unless an exception ends the block: then they are
    cancelled, as they are by `close()`.

    Args:
        address: `local` starts a Ray for this process, or joins the one that the process already has; `auto` and
            `ray://HOST:PORT` connect to a running cluster; `inline` computes in a thread of this process, without
            Ray. `http://HOST:PORT` is a service, and takes the arguments of `jacray.http.remote.RemoteClient`.
        workers: how many workers compute at a time.
        cpus_per_worker: what each worker is given; a worker has max(1, int(cpus_per_worker)) torch threads.
        gpus_per_worker: how many GPUs each is given; 0 computes on CPUs, 0.5 lets two workers share one.
        resources: what else of a cluster each worker takes, by name.
        runtime_env: what a running cluster's nodes get sent or install for this process's jobs, in Ray's own words,
            such as `{"py_modules": ["my_package"]}`; only with `auto` and `ray://`.
        shard_timeout: seconds that a worker may take over one shard, before it is replaced and the shard computed
            elsewhere; None for any number. The first shard of a job includes getting the model and the inputs.
        shard_size: samples per shard, where the plan's choice does not do: smaller ones lose less when a worker is
            lost, and cost more to hand out.
        limits: how much may be queued and running before `submit` refuses.

    Raises:
        RequestError: an argument breaks a rule.
    """

    def __new__(cls, address: str = "local", **_: Any) -> Self:
        """A client of a service where the address is a URL."""
        if cls is Client and address.startswith(("http://", "https://")):
            from jacray.http.remote import RemoteClient

            return cast("Self", object.__new__(RemoteClient))
        return object.__new__(cls)

    def __init__(
        self,
        address: str = "local",
        *,
        workers: int = 2,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        shard_timeout: float | None = None,
        shard_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        check_shards(shard_timeout, shard_size)
        self._address = address
        self._executor = make_executor(
            WorkerOptions(address, workers, cpus_per_worker, gpus_per_worker, resources or {}, runtime_env or {})
        )
        self._shard_timeout, self._shard_size = shard_timeout, shard_size
        self._door = Door(limits or Limits())
        self._keyed: dict[str, _Keyed] = {}
        self._submitting = threading.Lock()
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        # Runs at the latest when the interpreter ends, so that no Ray outlives a script that forgot to close.
        self._finalizer = weakref.finalize(self, self._executor.close)

    def __enter__(self) -> Self:
        self._executor.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for job in list(self._jobs):
                    job.wait()
        finally:  # also when Ctrl-C ends the waiting
            self.close()

    def submit(
        self,
        model: Any,
        x: Any,
        *,
        request: Request | None = None,
        to: str | os.PathLike[str] | Target | None = None,
        key: str | None = None,
        on_error: OnError = "fail",
        user: str = "",
        **fields: Unpack[AllFields],
    ) -> Job:
        """Check, plan and start a job. Returns while it runs; the first job also waits for Ray to be up.

        The job has its own snapshot of model and inputs: what the caller changes later does not change it.

        Args:
            model: an `nn.Module`, a callable of tensors or a model spec.
            x: a tensor or a pytree of tensors, the batch first; or what `jacray_workers.sources.load` gave, whose
                fields are then kept with the results; or what `sources.rows` gave, of which each worker reads the
                samples of its shards, so that a data set may be larger than memory.
            request: a request made before; `fields` change some of it.
            to: a folder that every worker reaches, or a URL such as `s3://BUCKET/RUN`. Workers write their blocks into
                its `results.zarr` as they go, and the result is read from there when it is sliced, so it may be larger
                than memory. None gives the result in memory. Beside it is the job's journal (of a URL a copy that
                follows within seconds): submitted again, the same job goes on from what is finished there, and
                another job is refused.
            key: an idempotency key. The job that was submitted with it before is given back, unless it failed or was
                cancelled: then it is started again.
            on_error: what a shard that always fails does. `fail` ends the job with its error; `skip` finishes the
                others, leaves NaN at its samples and lists them in the receipt.
            user: whose job it is. Workers are shared fairly among users, and among the jobs of one.
            **fields: the fields of `Request`. `verify` is on unless switched off.

        Raises:
            UserError: the model, the inputs or a field breaks a rule; no worker has seen the job then.
            BusyError: more is queued and running than the client's limits allow.
            JobError: the client is closed, or the key was used for another job.
        """
        if self.closed:
            raise JobError("client", "is closed", None, "make a new jacray.Client")
        asked = self._completed(make_request(request, **fields))
        order = Order(as_model(model), loaded(x), asked, None if to is None else as_target(to), key, on_error, user)
        if key is None:
            return self._start(order)
        # One at a time, so that two threads with one key cannot both be first.
        with self._submitting:
            found = self._digests(order)
            known = self._keyed.get(key)
            if known is not None and known.digests != found:
                changed = "; ".join(differing(known.digests, found))
                raise JobError("key", f"was used for another job ({changed})", key, "use a new key")
            if known is None or known.job.status().state in ("failed", "cancelled"):
                known = self._keyed[key] = _Keyed(self._start(order), found)
            return known.job

    def scale(self, workers: int) -> None:
        """Go on with another number of workers, also while jobs run: those let go finish what they have.

        Plans that are made stay as they are; plans to come reckon with the new number.

        Raises:
            RequestError: not a whole number, at least 1; or a Ray of our own has not the GPUs.
        """
        check_workers(workers)
        self._executor.scale(workers)

    def compute(
        self, model: Any, x: Any, *, request: Request | None = None, batch: bool = True, **fields: Unpack[AllFields]
    ) -> Result:
        """Submit a job and wait for its result; a service computes small work in one round trip.

        `batch` is for a service: whether the work may be computed together with others' of its kind.
        """
        del batch
        return self.submit(model, x, request=request, **fields).result()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Cancel what still runs, end the workers, and shut Ray down where this client started it."""
        for job in list(self._jobs):
            job.cancel()
        for job in list(self._jobs):
            job.wait()
        self._finalizer()

    def __repr__(self) -> str:
        return f"Client({self._address!r}, workers={self._executor.workers}{', closed' if self.closed else ''})"

    def _completed(self, request: Request) -> Request:
        """The request with the defaults that differ between jobs and bare functions."""
        changes: dict[str, Any] = {}
        if request.verify is None:
            changes["verify"] = True
        if request.device == "auto" and self._executor.device != "auto":
            changes["device"] = self._executor.device
        return make_request(request, **changes) if changes else request

    def _digests(self, order: Order) -> dict[str, str]:
        inputs = order.loaded.inputs
        known = inputs.digest if isinstance(inputs, Rows) else inputs
        return digests(order.model, known, order.request, self._executor.threads)

    def _start(self, order: Order) -> Job:
        books = open_books(order.target, lambda: self._digests(order))
        try:
            with self._door.trying(Load(1, 0, order.nbytes)) as load:
                return self._prepare(order, books, load)
        except BaseException as error:
            if books is not None:
                books.end(error)
            raise

    def _prepare(self, order: Order, books: Books | None, load: Load) -> Job:
        began = time.perf_counter()
        prepared, plan = self._plan(order, None if books is None else books.plan)
        check_on_error(order.on_error, plan)
        ledger = Ledger(self._describe(), job=uuid.uuid4().hex[:12])
        ledger.seconds["plan"] = time.perf_counter() - began
        with self._door.trying(Load(0, plan.shard_count, 0)) as shards:
            began = time.perf_counter()
            # As tensors, whatever they were given as, in the structure that the model takes.
            inputs = order.loaded.inputs
            if not isinstance(inputs, Rows):
                inputs = pytree.tree_unflatten(list(prepared.leaves), prepared.problem.call.spec)
            if books is not None:
                ledger.job = books.enter(plan, order.key, order.user)
            if order.target is not None:
                begin_store(order.target, prepared, plan, order.loaded.fields, order.loaded.start)
            writes = bool(prepared.problem.written)
            payload = Payload(order.model, inputs, order.request, plan, order.target, writes)
            task = self._executor.keep(ledger.job, payload)
            task.user, task.timeout = order.user, self._shard_timeout
            ledger.seconds["send"] = time.perf_counter() - began
            # What is left of the preparation only gives the results their structure.
            prepared = replace(prepared, leaves=(), cotangents=None, tangents=None)
            return self._launch(_Work(task, prepared, ledger, order.on_error, load.plus(shards), books))

    def _plan(self, order: Order, earlier: Plan | None) -> tuple[Prepared, Plan]:
        """The job prepared, and its plan: made now, or the one of an earlier run of it."""
        with torch_threads(self._executor.threads):
            prepared = prepare(
                order.model, order.loaded.inputs, order.request, plan=earlier, workers=self._executor.workers,
                apart=order.target is not None,
            )  # fmt: skip
        if earlier is not None:
            return prepared, earlier
        with torch_threads(self._executor.threads):
            plan = in_units(
                prepared.plan, order.request, self._shard_size, lambda: pace(prepared), self._executor.workers
            )
        return prepared, replace(plan, threads=self._executor.threads)

    def _describe(self) -> dict[str, Any]:
        executor = self._executor
        return {
            "name": executor.name, "address": self._address, "workers": executor.workers, "threads": executor.threads
        }  # fmt: skip

    def _launch(self, work: _Work) -> Job:
        task = work.task
        job = Job(task.id, task.plan, lambda: self._executor.cancel(task))
        self._jobs.add(job)
        # The thread refers to the client, so a client that nobody else holds stays open while its jobs run.
        thread = threading.Thread(target=self._run, args=(work, job), name=f"jacray-{job.id}", daemon=True)
        thread.start()
        return job

    def _run(self, work: _Work, job: Job) -> None:
        """A job's thread: everything that happens ends in the job, nothing escapes."""
        result: Result | None = None
        error: BaseException | None = None
        try:
            record = None if work.books is None else work.books.record(work.task.plan)
            result = drive(
                self._executor, work.task, work.prepared, work.ledger, job.emit, record=record, on_error=work.on_error
            )
        except BaseException as caught:  # noqa: BLE001  (it is raised again by `job.result`)
            error = caught
        finally:
            self._executor.drop(work.task)
            self._door.leave(work.load)
        if work.books is not None:
            try:
                work.books.end(error)
            except StorageError as full:
                error = error or full
        job.settle(result, error)


@dataclass(frozen=True)
class _Work:
    """What a job's thread needs."""

    task: Task
    prepared: Prepared
    ledger: Ledger
    on_error: OnError
    load: Load
    books: Books | None


@dataclass(frozen=True)
class _Keyed:
    """A job that was submitted with a key, and what it was."""

    job: Job
    digests: Mapping[str, str]
