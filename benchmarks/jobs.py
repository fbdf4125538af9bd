"""What dispatch costs: a shard in the coordinator, a job on Ray beside the same kernels here, two workers beside one.

    python -m benchmarks.jobs [shards] [plan] [ray]

Each ratio has both sides in this one run, alternating, and the best of a few rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jacray
import torch
from jacray.coordinator import drive
from jacray.entries import JobRow
from jacray.executors.base import Task
from jacray.executors.dispatch import Dispatch
from jacray.executors.pool import Seat
from jacray.executors.worker import Reply
from jacray.journal import Journal
from jacray.log import EventLog
from jacray.receipt import Ledger
from jacray.record import Record
from jacray_workers.engine import prepare
from jacray_workers.plan import Plan, Shard
from jacray_workers.request import make_request
from jacray_workers.shard import ShardResult
from torch import nn

ROUNDS = 3
NOTHING = torch.zeros(1, 1)


class EmptyPool:
    """Eight workers that answer at once with nothing."""

    def __init__(self) -> None:
        self.queue: dict[int, Shard] = {}
        self.count = 0

    def seats(self) -> Sequence[Seat]:
        return [Seat(i, 0) for i in range(8)]

    def submit(self, seat: Seat, task: Task, shard: Shard, halvings: int) -> Hashable:
        self.count += 1
        self.queue[self.count] = shard
        return self.count

    def wait(self, tickets: Sequence[Hashable], seconds: float) -> Sequence[Hashable]:
        return list(tickets)[:1]

    def fetch(self, ticket: Any) -> Reply:
        return Reply(ShardResult(self.queue.pop(ticket), {"outputs": NOTHING}))

    def cancel(self, task: Task) -> None: ...

    def replace(self, seat: Seat, *, blame: bool) -> None: ...


class EmptyExecutor:
    """A dispatcher over that pool."""

    workers = 8

    def run(self, task: Task, into: Any) -> Any:
        return Dispatch(EmptyPool()).steps(task)


def empty_shards(count: int) -> None:
    """The coordinator's own time per shard, journal and events included, and what its memory grows by."""
    prepared = prepare(nn.Identity(), torch.zeros(count, 1), make_request(None, returns="outputs", chunk_size=1))
    plan: Plan = replace(prepared.plan, shard_size=1)
    log = EventLog("bench")
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:
        journal.enter(JobRow("bench", {}, {}, "", count, count))
        before, began = peak(), time.perf_counter()
        drive(
            EmptyExecutor(), Task("bench", plan, None), prepared,  # type: ignore[arg-type]
            Ledger({}), log.append, record=Record(journal, "bench", plan, None),
        )  # fmt: skip
        took = time.perf_counter() - began
    print(f"{count:,} empty shards: {took / count * 1e3:.3f} ms each, peak memory {peak() - before:+.1f} MiB")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planning(samples: int) -> None:
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)), torch.zeros(samples, 4)
    jacray.plan(model, x[:10])
    began = time.perf_counter()
    plan = jacray.plan(model, x, memory_budget="8GiB", method="reverse")
    print(f"planning {samples:,} samples: {time.perf_counter() - began:.3f} s, {plan.shard_count:,} shards")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 16))


FIELDS: dict[str, Any] = {
    "returns": ["singular_values", "norms"],
    "method": "reverse",
    "chunk_size": 32,
    "verify": False,
}


def seconds(client: jacray.Client, x: torch.Tensor) -> float:
    began = time.perf_counter()
    client.submit(net(), x, **FIELDS).result()
    return time.perf_counter() - began


def half(start: Any, ends: Any, samples: int) -> None:
    """A process that computes when told to, on its own."""
    with jacray.Client("inline", workers=2) as client:
        x = torch.randn(samples, 64)
        seconds(client, x[:64])
        for _ in range(ROUNDS):
            start.wait()
            seconds(client, x)
            ends.wait()


def machine(samples: int) -> float:
    """Seconds for two processes that know nothing of each other, half of the samples each: what two cores can do."""
    processes = multiprocessing.get_context("spawn")
    start, ends = processes.Barrier(3), processes.Barrier(3)
    both = [processes.Process(target=half, args=(start, ends, samples // 2)) for _ in range(2)]
    for process in both:
        process.start()
    took = []
    for _ in range(ROUNDS):
        start.wait()
        began = time.perf_counter()
        ends.wait()
        took.append(time.perf_counter() - began)
    for process in both:
        process.join()
    return min(took)


def on_ray(samples: int) -> None:
    """Wall time of whole jobs, submission included, on warm workers."""
    x, apart = torch.randn(samples, 64), machine(samples)
    inline = jacray.Client("inline", workers=1)
    with jacray.Client("local", workers=2) as two, jacray.Client("local", workers=1) as one:
        for client in (inline, one, two):
            seconds(client, x[:64])
        found = [[seconds(client, x) for client in (inline, one, two)] for _ in range(ROUNDS)]
    here, by_one, by_two = (min(column) for column in zip(*found, strict=True))
    print(f"the same kernels in one process {here:.2f} s, by one Ray worker {by_one:.2f} s: {by_one / here - 1:+.1%}")
    print(f"by two Ray workers of one CPU each {by_two:.2f} s: {by_one / by_two:.2f} times as fast as by one")
    print(f"by two processes that know nothing of each other {apart:.2f} s: {here / apart:.2f} times as fast as by one")


def main() -> None:
    """All of it, or what is named: shards, plan, ray."""
    named = sys.argv[1:] or ["shards", "plan", "ray"]
    if "shards" in named:
        empty_shards(10_000)
        empty_shards(100_000)
    if "plan" in named:
        planning(10_000_000)
    if "ray" in named:
        on_ray(40_000)


if __name__ == "__main__":
    main()
