"""Shards in this process, one at a time, with as many torch threads as a Ray worker would have."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from jacray_workers.engine import prepare
from jacray_workers.errors import StorageError
from jacray_workers.plan import Shard

from jacray.executors.base import Begun, Done, Failed, Into, Payload, Step, Task, samples_of, was_cancelled
from jacray.executors.options import WorkerOptions
from jacray.executors.shards import compute, writer_for
from jacray.executors.threads import torch_threads
from jacray.transport import unpack


class InlineExecutor:
    """Computes in the calling thread, which a client makes a thread of the job's own.

    A model that draws random numbers draws them from torch's one generator, which it shares with the caller's other
    threads: where these draw too while a job runs, a local Ray keeps the two apart.

    Args:
        options: its `workers` are what a plan reckons with, so that the same job has the same plan on as many Ray
            workers; its CPUs are the torch threads while a shard is computed.
    """

    name = "inline"
    device = "auto"

    def __init__(self, options: WorkerOptions) -> None:
        self.workers = options.workers
        self.threads = options.threads
        self._turn = threading.Lock()

    def begin(self) -> None:
        """Nothing to do."""

    def keep(self, job: str, payload: Payload) -> Task:
        """Copy the model and the inputs, the way they travel to Ray, so that both executors compute on the same."""
        mine: Payload = unpack(payload.pack(copy=True), in_place=True)
        # Here and not in the job's thread: to prepare is to watch whether the model draws random numbers.
        with torch_threads(self.threads):
            prepared = prepare(mine.model, mine.inputs, mine.request, plan=mine.plan)
        return Task(job, mine.plan, (prepared, writer_for(mine.target, mine.plan)), mine.target)

    def run(self, task: Task, into: Into) -> Iterator[Step]:
        """Compute the shards in order."""
        yield Begun()
        for shard in task.shards():
            yield self._compute(task, shard, into)

    def scale(self, workers: int) -> None:
        """Reckon with another number of workers in the plans to come."""
        self.workers = workers

    def cancel(self, task: Task) -> None:
        """End the task at the next chunk."""
        task.cancelled.set()

    def drop(self, task: Task) -> None:
        """Let go of the copies."""
        task.held = None

    def close(self) -> None:
        """Nothing to do."""

    def _compute(self, task: Task, shard: Shard, into: Into) -> Step:
        with self._turn, torch_threads(self.threads):
            if task.cancelled.is_set():
                raise was_cancelled(task)
            try:
                prepared, writer = task.held
                return Done(compute(prepared, writer, shard, task.cancelled.is_set, into(shard)), self.name)
            except Exception as error:  # noqa: BLE001  (what the job does about it is for its driver to say)
                if task.cancelled.is_set():
                    raise was_cancelled(task) from None
                if not isinstance(error, StorageError):
                    error.add_note(f"while computing {samples_of(shard)}")
                return Failed(shard, error, 1, self.name)
