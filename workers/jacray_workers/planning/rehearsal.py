"""Run one chunk before the job where memory is scarce, for what a few samples show is not all that many need.

The planner's line comes from one and two samples. With more of them other steps of a method may take the most, and
kernels have workspaces of their own that no tensor shows. Near the budget a chunk is therefore run as the job will run
it, its peak is taken, and the chunk shrinks until it keeps within.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from jacray_workers.plan import Plan, Shard
from jacray_workers.planning import memory, sizing
from jacray_workers.run import run_shard

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared

# Plans below this share of the budget are taken at their word.
NEAR = 0.25
# The chunks that are tried, as parts of the one planned: large enough to show what it does, and small enough to fit.
PARTS = (8, 3)
# Seconds between two looks at the process's resident memory.
LOOK = 0.001


def rehearse(prepared: Prepared) -> Plan:
    """The plan, with a smaller chunk where one would take more than the budget leaves.

    Raises:
        BudgetError: not even one sample, or not the chunk that was asked for, keeps within; names both figures.
    """
    plan = prepared.plan
    # Where one sample is cut into shards there is no smaller chunk to go to.
    if plan.peak_bytes <= NEAR * plan.budget_bytes or plan.row_cuts:
        return plan
    per_sample = _kept_per_sample(plan)
    resident = Resident()
    tried = [_run(prepared, chunk, resident) for chunk in sorted({max(1, plan.chunk_size // part) for part in PARTS})]
    # What a shard holds beside a chunk is added; a chunk's own part of it is in what it took.
    line = memory.fit([(chunk, taken - chunk * per_sample) for chunk, taken in tried])
    room = plan.budget_bytes - plan.shard_size * per_sample
    chunk = min(plan.chunk_size, line.fit_in(room), _safe(tried, plan.chunk_size))
    asked = prepared.request.chunk_size
    if chunk < 1 or (asked is not None and chunk < min(asked, plan.samples)):
        wanted = asked or 1
        raise sizing.refusal(line.at(wanted) + plan.shard_size * per_sample, plan.budget_bytes, wanted)
    peak = line.at(chunk) + plan.shard_size * per_sample
    return dataclasses.replace(_with_chunk(plan, chunk), peak_bytes=peak)


def _safe(tried: list[tuple[int, int]], most: int) -> int:
    """A chunk that ran out of memory in the attempt came back smaller: nothing above that is tried again."""
    return most if tried[-1][0] >= most // PARTS[-1] else tried[-1][0]


def _with_chunk(plan: Plan, chunk: int) -> Plan:
    """The plan with another chunk, and shards that are whole numbers of them, never larger than before."""
    shard = plan.samples if plan.shard_size >= plan.samples else max(chunk, plan.shard_size // chunk * chunk)
    return dataclasses.replace(plan, chunk_size=chunk, shard_size=shard)


def _kept_per_sample(plan: Plan) -> int:
    """Bytes of result that a sample adds to its shard."""
    kept = sizing.bytes_per_sample([a for a in plan.arrays if not a.factored], plan.samples)
    summed = sum(sizing.array_bytes(a) for a in plan.arrays if a.axis < 0)
    dense = sum(sizing.array_bytes(a) for a in plan.arrays if a.axis >= 0 and not a.factored)
    factors = max(plan.bytes_out - summed - dense, 0) // plan.samples if any(a.factored for a in plan.arrays) else 0
    return kept + math.ceil(factors)


def _run(prepared: Prepared, chunk: int, resident: Resident) -> tuple[int, int]:
    """Run one chunk: how many samples it came to after running out of memory, and the bytes that it took."""
    request = prepared.request.model_copy(update={"verify": False, "nan_policy": "propagate"})
    quiet = dataclasses.replace(prepared, request=request, plan=dataclasses.replace(prepared.plan, chunk_size=chunk))
    found: list[int] = []

    def work() -> None:
        found[:] = [run_shard(quiet, Shard(0, 0, chunk)).chunk_size]

    device = prepared.problem.device
    if device.type == "cuda":
        taken = memory.measure(work, device)
    else:
        taken = memory.measure(lambda: resident.during(work), device)
        taken = max(taken, resident.growth)
    return min(chunk, found[0]), taken


class Resident:
    """How much the process's resident memory grew, at its highest, since this was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.growth = 0

    def during(self, work: Callable[[], None]) -> None:
        """Do some work, and look at the resident memory all the while."""
        self.growth = 0
        done = threading.Event()
        watcher = threading.Thread(target=self._look, args=(done,), name="jacray-rehearsal", daemon=True)
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()

    def _look(self, done: threading.Event) -> None:
        while not done.wait(LOOK):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)
