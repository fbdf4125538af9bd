"""Shards in this process, one at a time, with as many torch threads as a Ray worker would have."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from jacray_workers.engine import Prepared, prepare, run_shard
from jacray_workers.errors import JacrayError
from jacray_workers.plan import Shard
from jacray_workers.shard import ShardResult

from jacray.executors.base import Begun, Done, Into, Step, Task, Work, samples_of, was_cancelled
from jacray.executors.threads import torch_threads
from jacray.transport import unpack


class InlineExecutor:
    """Computes in the calling thread. torch's threads and random state are the process's while a shard runs.

    Args:
        workers: what a plan reckons with, so that the same job has the same plan on as many Ray workers.
        threads: torch threads while a shard is computed.
    """

    name = "inline"
    device = "auto"

    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers
        self.threads = threads
        self._turn = threading.Lock()

    def begin(self) -> None:
        """Nothing to do."""

    def keep(self, job: str, work: Work) -> Task:
        """Copy the model and the inputs. Copied the way they travel to Ray, so both executors compute on the same."""
        return Task(job, work.plan, work.pack(copy=True))

    def run(self, task: Task, into: Into) -> Iterator[Step]:
        """Compute the shards in order."""
        yield Begun()
        work: Work = unpack(task.held, in_place=True)
        with self._turn, torch_threads(self.threads):
            prepared = prepare(work.model, work.inputs, work.request, plan=work.plan)
        for shard in task.plan.shards():
            yield Done(self._compute(task, prepared, shard, into), self.name)

    def cancel(self, task: Task) -> None:
        """End the task at the next chunk."""
        task.cancelled.set()

    def drop(self, task: Task) -> None:
        """Let go of the copies."""
        task.held = None

    def close(self) -> None:
        """Nothing to do."""

    def _compute(self, task: Task, prepared: Prepared, shard: Shard, into: Into) -> ShardResult:
        with self._turn, torch_threads(self.threads):
            if task.cancelled.is_set():
                raise was_cancelled(task)
            try:
                return run_shard(prepared, shard, cancelled=task.cancelled.is_set, into=into(shard))
            except Exception as error:
                if task.cancelled.is_set():
                    raise was_cancelled(task) from None
                if not isinstance(error, JacrayError):
                    error.add_note(f"while computing {samples_of(shard)}")
                raise
