"""The stations of a job, from its plan to its result. What happens on the way goes out as events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jacray_workers.engine import Prepared, run_shard
from jacray_workers.errors import StorageError
from jacray_workers.plan import Plan
from jacray_workers.shard import ShardResult
from jacray_workers.straight.lane import Answer
from jacray_workers.trust import finite
from torch import Tensor

from jacray import receipt
from jacray.events import Event, JobStarted, ShardDone, ShardFailed, ShardRetried, ShardsKept
from jacray.executors.base import Begun, Done, Executor, Failed, Retried, Step, Task
from jacray.failures import Failures, OnError
from jacray.gather import Gather, Gathering
from jacray.outcome import gathering, outcome
from jacray.receipt import Ledger
from jacray.result import Result

if TYPE_CHECKING:
    from jacray.record import Record

Emit = Callable[[Event], None]


def compute_here(prepared: Prepared, planned: float) -> Result:
    """Compute every shard in this thread, in order, with the caller's own torch threads.

    Args:
        prepared: the job.
        planned: how many seconds preparing took.

    Raises:
        UserError: what the model or the request cannot do.
    """
    ledger = Ledger({"name": "function"})
    began = time.perf_counter()
    gather = Gather(prepared.plan)
    for shard in prepared.plan.shards():
        result = run_shard(prepared, shard, into=gather.into(shard))
        gather.add(result)
        ledger.done(result, "function")
    ledger.seconds.update(plan=planned, compute=time.perf_counter() - began)
    return _result(prepared, gather, prepared.plan, ledger)


def recalled(answer: Answer, seconds: float) -> Result:
    """The result of a call that went the short way, which knows its plan from an earlier one.

    Args:
        answer: what it gave.
        seconds: how long it took.
    """
    plan, value = answer.kept.plan, answer.value
    ledger = Ledger({"name": "function"})
    ledger.seconds.update(plan=0.0, compute=seconds)
    (name,) = answer.kept.request.returns
    found = (finite.locate(a.key, v, a.axis) for a, v in zip(plan.arrays, _arrays(value), strict=True))
    bad = tuple(each for each in found if each is not None)
    facts = {"threads": torch.get_num_threads(), "device": plan.device}
    (shard,) = plan.shards()
    ledger.done(ShardResult(shard, {}, (), bad, seconds, plan.samples, facts), "function")
    return Result({name: value}, plan, lambda: receipt.build(plan, answer.kept.request, ledger))


def _arrays(value: Any) -> Sequence[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


def drive(
    executor: Executor,
    task: Task,
    prepared: Prepared,
    ledger: Ledger,
    emit: Emit,
    *,
    record: Record | None = None,
    on_error: OnError = "fail",
) -> Result:
    """Run a task on an executor until every shard is done.

    Args:
        executor: where shards are computed.
        task: the executor's snapshot of the job.
        prepared: the job as the client prepared it, for the structure of its results.
        ledger: takes what the receipt needs.
        emit: takes every event, in order.
        record: the job's lines in a journal. What they have as done is not computed again.
        on_error: what to do about a shard that is given up.

    Raises:
        CancelledError: the task was cancelled.
        UserError: what the model or the request cannot do, or the storage.
        ShardError: a shard was lost too often, or there is no worker.
        Exception: what the model raised.
    """
    run = _Drive(executor, task, ledger, emit, record, on_error)
    run.compute()
    return _result(prepared, run.gather, task.plan, ledger)


class _Drive:
    """One task on its way: every step goes to the arrays, the ledger, the journal and the listeners."""

    def __init__(
        self,
        executor: Executor,
        task: Task,
        ledger: Ledger,
        emit: Emit,
        record: Record | None,
        on_error: OnError,
    ) -> None:
        self.executor, self.task, self.plan = executor, task, task.plan
        self.ledger, self.emit, self.record = ledger, emit, record
        self.gather = gathering(task.plan, task.target)
        self.failures = Failures(on_error, keeps=record is not None and record.keeps)
        self.skips = on_error == "skip"
        self.kept = ShardsKept(task.id, 0.0, 0, 0)

    def compute(self) -> None:
        """Compute what is left to compute."""
        queued = began = time.perf_counter()
        self._resume()
        if self.kept.shards == self.plan.shard_count:
            self._begin()
        else:
            for step in self._steps():
                if isinstance(step, Begun):
                    began = time.perf_counter()
                    self._begin()
                else:
                    self._take(step)
        self.failures.finish(self.ledger.shards_done)
        self.ledger.seconds.update(queue=began - queued, compute=time.perf_counter() - began)

    def _steps(self) -> Iterator[Step]:
        steps = self.executor.run(self.task, self.gather.into)
        with contextlib.closing(cast("Generator[Step]", steps)):
            yield from steps

    def _resume(self) -> None:
        """Take over what an earlier run has done."""
        if self.record is None:
            return
        indices: set[int] = set()
        samples = 0
        for result, worker in self.record.kept():
            self.gather.add(result)
            self.ledger.done(result, worker, kept=True)
            indices.add(result.shard.index)
            samples += result.shard.stop - result.shard.start
        self.task.kept = indices
        self.kept = ShardsKept(self.task.id, 0.0, len(indices), samples)

    def _begin(self) -> None:
        now, plan = time.monotonic(), self.plan
        self.emit(JobStarted(self.task.id, now, plan.samples, plan.shard_count, self.executor.workers))
        if self.kept.shards:
            self.emit(replace(self.kept, at=now))

    def _take(self, step: Done | Retried | Failed) -> None:
        match step:
            case Done():
                self._done(step)
            case Retried():
                self.ledger.retried(step)
                if self.record is not None:
                    self.record.retried(step)
                self.emit(ShardRetried(self.task.id, time.monotonic(), step.shard.index, step.attempt, step.reason))
            case Failed():
                self._failed(step)

    def _done(self, step: Done) -> None:
        result, shard = step.result, step.result.shard
        self.gather.add(result)
        self.ledger.done(result, step.worker)
        if self.record is not None:
            self.record.done(step)
        self.emit(
            ShardDone(
                self.task.id, time.monotonic(), shard.index, shard.stop - shard.start, result.seconds, step.worker
            )
        )

    def _failed(self, step: Failed) -> None:
        shard, told = step.shard, f"{type(step.error).__name__}: {step.error}"
        if self.record is not None and not isinstance(step.error, StorageError):
            self.record.failed(step)
        self.emit(ShardFailed(self.task.id, time.monotonic(), shard.index, shard.start, shard.stop, step.attempt, told))
        self.failures.add(step, self.ledger.shards_done)
        if self.skips:
            self.gather.skip(shard)
            self.ledger.skip(step)


def _result(prepared: Prepared, gathered: Gathering, plan: Plan, ledger: Ledger) -> Result:
    return outcome(prepared, gathered, plan, lambda: receipt.build(plan, prepared.request, ledger))
