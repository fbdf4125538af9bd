"""Submit jobs to an executor: this process, a local Ray or a cluster."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack, cast

from jacray_workers.engine import Prepared, prepare
from jacray_workers.errors import JobError
from jacray_workers.models import as_model
from jacray_workers.request import Request, make_request
from torch.utils import _pytree as pytree

from jacray.coordinator import drive
from jacray.executors import make_executor
from jacray.executors.base import Executor, Payload, Task
from jacray.executors.threads import torch_threads
from jacray.fields import AllFields
from jacray.job import Job
from jacray.receipt import Ledger
from jacray.result import Result


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
        gpus_per_worker: how many GPUs each is given; 0 computes on CPUs.

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
    ) -> None:
        self._address = address
        self._executor = make_executor(address, workers, cpus_per_worker, gpus_per_worker)
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

    def submit(self, model: Any, x: Any, *, request: Request | None = None, **fields: Unpack[AllFields]) -> Job:
        """Check, plan and start a job. Returns while it runs; the first job also waits for Ray to be up.

        The job has its own snapshot of model and inputs: what the caller changes later does not change it.

        Args:
            model: an `nn.Module`, a callable of tensors or a model spec.
            x: a tensor or a pytree of tensors, the batch first.
            request: a request made before; `fields` change some of it.
            **fields: the fields of `Request`. `verify` is on unless switched off.

        Raises:
            UserError: the model, the inputs or a field breaks a rule; no worker has seen the job then.
            JobError: the client is closed.
        """
        if self.closed:
            raise JobError("client", "is closed", None, "make a new jacray.Client")
        asked = self._completed(make_request(request, **fields))
        module = as_model(model)
        began = time.perf_counter()
        with torch_threads(self._executor.threads):
            prepared = prepare(module, x, asked, workers=self._executor.workers)
        plan = replace(prepared.plan, threads=self._executor.threads)
        ledger = Ledger(self._describe(), seconds={"plan": time.perf_counter() - began})
        began = time.perf_counter()
        ledger.job = uuid.uuid4().hex[:12]
        # As tensors, whatever they were given as, in the structure that the model takes.
        inputs = pytree.tree_unflatten(list(prepared.leaves), prepared.problem.call.spec)
        task = self._executor.keep(ledger.job, Payload(module, inputs, asked, plan))
        ledger.seconds["send"] = time.perf_counter() - began
        # What is left of the preparation only gives the results their structure.
        return self._launch(task, replace(prepared, leaves=(), cotangents=None, tangents=None), ledger)

    def compute(self, model: Any, x: Any, *, request: Request | None = None, **fields: Unpack[AllFields]) -> Result:
        """Submit a job and wait for its result; a service computes small work in one round trip."""
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

    def _describe(self) -> dict[str, Any]:
        executor = self._executor
        return {
            "name": executor.name, "address": self._address, "workers": executor.workers, "threads": executor.threads
        }  # fmt: skip

    def _launch(self, task: Task, prepared: Prepared, ledger: Ledger) -> Job:
        executor = self._executor
        job = Job(task.id, task.plan, lambda: executor.cancel(task))
        self._jobs.add(job)
        # The thread refers to the client, so a client that nobody else holds stays open while its jobs run.
        thread = threading.Thread(
            target=_run, args=(self, executor, task, prepared, ledger, job), name=f"jacray-{job.id}", daemon=True
        )
        thread.start()
        return job


def _run(client: Client, executor: Executor, task: Task, prepared: Prepared, ledger: Ledger, job: Job) -> None:
    """A job's thread: everything that happens ends in the job, nothing escapes."""
    result: Result | None = None
    error: BaseException | None = None
    try:
        result = drive(executor, task, prepared, ledger, job.emit)
    except BaseException as caught:  # noqa: BLE001  (it is raised again by `job.result`)
        error = caught
    finally:
        executor.drop(task)
    job.settle(result, error)
    del client
