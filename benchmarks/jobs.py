"""What dispatch costs: a shard in the coordinator, a job on Ray beside the same kernels here, two workers beside one.

    python -m benchmarks.jobs [shards] [plan] [ray] [--samples 80000] [--rounds 2]

Each ratio has both sides in this one run, alternating, and the best of a few rounds. Beside the two workers stand two
processes that share nothing: what the machine gives to two of anything.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import contextlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jacray
import psutil
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
    # Once before: the first derivative of torch.func in a process loads torch's compiler, a second of its own.
    jacray.plan(model, x[:10], method="reverse")
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


def half(start: Any, ends: Any, samples: int, rounds: int) -> None:
    """A process that computes when told to, on its own."""
    with jacray.Client("inline", workers=2) as client:
        x = torch.randn(samples, 64)
        seconds(client, x[:64])
        for _ in range(rounds):
            start.wait()
            seconds(client, x)
            ends.wait()


@contextlib.contextmanager
def apart(samples: int, rounds: int) -> Iterator[Callable[[], float]]:
    """Two processes that know nothing of each other, half of the samples each: what two cores can do, once a call."""
    processes = multiprocessing.get_context("spawn")
    start, ends = processes.Barrier(3), processes.Barrier(3)
    both = [processes.Process(target=half, args=(start, ends, samples // 2, rounds)) for _ in range(2)]
    for process in both:
        process.start()

    def together() -> float:
        start.wait()
        began = time.perf_counter()
        ends.wait()
        return time.perf_counter() - began

    yield together
    for process in both:
        process.join()


def spent() -> dict[str, float]:
    """CPU seconds of this process, of Ray's workers, and of Ray's other processes."""
    found = {"coordinator": sum(psutil.Process().cpu_times()[:2]), "workers": 0.0, "the rest of Ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            kind = "workers" if "ray::" in command else "the rest of Ray" if "/ray/" in command else ""
            if kind:
                found[kind] += sum(process.cpu_times()[:2])
    return found


def on_ray(samples: int, rounds: int) -> None:
    """Wall time of whole jobs, submission included, on warm workers."""
    x = torch.randn(samples, 64)
    inline = jacray.Client("inline", workers=1)
    with (
        apart(samples, rounds) as together,
        jacray.Client("local", workers=2) as two,
        jacray.Client("local", workers=1) as one,
    ):
        for client in (inline, one, two):
            seconds(client, x[:64])
        found, before, during = [], {}, {}
        for _ in range(rounds):
            found.append([seconds(inline, x), seconds(one, x), together()])
            before = spent()
            found[-1].append(seconds(two, x))
            during = {name: cpu - before[name] for name, cpu in spent().items()}
    here, by_one, alone, by_two = (min(column) for column in zip(*found, strict=True))
    print(f"the same kernels in one process {here:.2f} s, by one Ray worker {by_one:.2f} s: {by_one / here - 1:+.1%}")
    print(f"by two Ray workers of one CPU each {by_two:.2f} s: {by_one / by_two:.2f} times as fast as by one")
    print(f"by two processes that know nothing of each other {alone:.2f} s: {here / alone:.2f} times as fast as by one")
    print(f"so two workers reach {by_one / by_two / (here / alone):.0%} of what the machine gives two processes")
    cpu = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in during.items())
    print(f"CPU over the last job by two workers ({found[-1][-1]:.2f} s on two cores): {cpu}")


def main() -> None:
    """All of it, or what is named: shards, plan, ray; `ray` goes in so many rounds of so many samples."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("named", nargs="*", choices=["shards", "plan", "ray", []], metavar="shards | plan | ray")
    parser.add_argument("--samples", type=int, default=80_000)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    named = given.named or ["shards", "plan", "ray"]
    if "shards" in named:
        empty_shards(10_000)
        empty_shards(100_000)
    if "plan" in named:
        planning(10_000_000)
    if "ray" in named:
        on_ray(given.samples, given.rounds)


if __name__ == "__main__":
    main()
