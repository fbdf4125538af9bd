"""The stations of a job, from its plan to its result. What happens on the way goes out as events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jacray_workers.engine import Prepared, assemble, run_shard
from jacray_workers.plan import Plan

from jacray import receipt
from jacray.events import Event, JobStarted, ShardDone, ShardRetried
from jacray.executors.base import Begun, Executor, Retried, Task
from jacray.gather import Gather
from jacray.receipt import Ledger
from jacray.result import Result

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
    return _result(prepared, gather.finish(), prepared.plan, ledger)


def drive(executor: Executor, task: Task, prepared: Prepared, ledger: Ledger, emit: Emit) -> Result:
    """Run a task on an executor until every shard is done.

    Args:
        executor: where shards are computed.
        task: the executor's snapshot of the job.
        prepared: the job as the client prepared it, for the structure of its results.
        ledger: takes what the receipt needs.
        emit: takes every event, in order.

    Raises:
        JobError: the task was cancelled.
        UserError: what the model or the request cannot do.
        ShardError: a shard was lost too often.
        Exception: what the model raised.
    """
    plan = task.plan
    queued = began = time.perf_counter()
    gather = Gather(plan)
    for step in executor.run(task, gather.into):
        if isinstance(step, Begun):
            began = time.perf_counter()
            emit(JobStarted(task.id, time.monotonic(), plan.samples, plan.shard_count, executor.workers))
            continue
        if isinstance(step, Retried):
            ledger.retried(step)
            emit(ShardRetried(task.id, time.monotonic(), step.shard.index, step.attempt, step.reason))
            continue
        result, shard = step.result, step.result.shard
        gather.add(result)
        ledger.done(result, step.worker)
        emit(ShardDone(task.id, time.monotonic(), shard.index, shard.stop - shard.start, result.seconds, step.worker))
    ledger.seconds.update(queue=began - queued, compute=time.perf_counter() - began)
    return _result(prepared, gather.finish(), plan, ledger)


def _result(prepared: Prepared, blocks: dict[str, Any], plan: Plan, ledger: Ledger) -> Result:
    """The user's structures. The receipt is written when somebody reads it: a small call should not pay for it."""
    values = assemble(replace(prepared, plan=plan), blocks)
    return Result(values, plan, lambda: receipt.build(plan, prepared.request, ledger))
