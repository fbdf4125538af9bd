"""Run one chunk before the job where memory is scarce, for what a few samples show is not all that many need.

The planner's line comes from one and two samples. With more of them other steps of a method may take the most, and
kernels have workspaces of their own that no tensor shows. Near the budget a chunk is therefore run as the job will run
it, its peak is taken, and the chunk shrinks until it keeps within.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jacray_workers.plan import Plan, Shard
from jacray_workers.planning import memory, sizing
from jacray_workers.run import run_shard

if TYPE_CHECKING:
    from jacray_workers.engine import Prepared

# The chunks that are tried, as parts of the one planned: large enough to show what it does, and small enough to fit.
PARTS = (8, 3)
# A job of so many chunks, or one that may not keep within, has its whole chunk tried too.
MANY = 8
# Seconds between two looks at the process's resident memory.
LOOK = 0.001


def rehearse(prepared: Prepared, before: int) -> Plan:
    """The plan, with a smaller chunk where one would take more than the budget leaves.

    Args:
        prepared: the job with its first plan.
        before: the process's resident memory when the job came: what planning has left behind counts.

    Raises:
        BudgetError: not even one sample, or not the chunk that was asked for, keeps within; names both figures.
    """
    plan = prepared.plan
    # Where one sample is cut into shards there is no smaller chunk to go to.
    if plan.peak_bytes <= memory.NEAR * plan.budget_bytes or plan.row_cuts:
        return plan
    per_sample = _kept_per_sample(plan)
    room = plan.budget_bytes - plan.shard_size * per_sample
    resident = Resident(before)
    tried = [_run(prepared, chunk, resident) for chunk in sorted({max(1, plan.chunk_size // part) for part in PARTS})]
    chunk, peak = _largest(prepared, tried, per_sample, room)
    if chunk > tried[-1].chunk and (tried[-1].ray(chunk) > room or plan.samples >= MANY * chunk):
        tried.append(_run(prepared, chunk, resident))
        chunk, peak = _largest(prepared, tried, per_sample, room)
    if prepared.problem.device.type == "cpu":
        memory.trim()
    return dataclasses.replace(_with_chunk(plan, chunk), peak_bytes=peak + plan.shard_size * per_sample)


def _largest(prepared: Prepared, tried: Sequence[_Tried], per_sample: int, room: int) -> tuple[int, int]:
    """The largest chunk that keeps within the room, and its peak beside what its shard holds.

    Raises:
        BudgetError: there is none, or it is smaller than what was asked for.
    """
    plan, asked = prepared.plan, prepared.request.chunk_size
    lines = _lines(tried, per_sample)
    chunk = min(plan.chunk_size, _safe(tried, plan.chunk_size), *(line.fit_in(room) for line in lines))
    if chunk < 1 or (asked is not None and chunk < min(asked, plan.samples)):
        wanted = asked or 1
        needed = max(line.at(wanted) for line in lines) + plan.shard_size * per_sample
        raise sizing.refusal(needed, plan.budget_bytes, wanted)
    return chunk, max(line.at(chunk) for line in lines)


@dataclasses.dataclass(frozen=True)
class _Tried:
    """A chunk as it came out: after running out of memory it is smaller than what was tried.

    Attributes:
        chunk: samples.
        tensors: bytes of tensors alive at once.
        resident: bytes by which the process grew; 0 on a GPU.
        fell: whether it ran out of memory.
    """

    chunk: int
    tensors: int
    resident: int
    fell: bool = False

    def ray(self, chunk: int) -> float:
        """The most that another chunk takes, whichever step of it takes the most: each is a line with a base."""
        return max(self.tensors, self.resident) * chunk / self.chunk


def _lines(tried: Sequence[_Tried], per_sample: int) -> list[memory.Line]:
    """Peak bytes by the samples of a chunk, beside what its shard holds: by the process's growth, and by its tensors.

    What a shard holds beside a chunk is added elsewhere; a chunk's own part of it is in what it took. The process also
    grows by what stands there once and for all, which makes its own line a flat one; the tensors' goes above that.
    """
    over = max(max(t.resident - t.tensors, 0) for t in tried)
    tried = tried[-2:]
    by_tensors = memory.fit([(t.chunk, t.tensors - t.chunk * per_sample) for t in tried])
    return [
        memory.Line(by_tensors.base + over / memory.SLACK, by_tensors.slope),
        memory.fit([(t.chunk, max(t.resident, t.tensors) - t.chunk * per_sample) for t in tried]),
    ]


def _safe(tried: Sequence[_Tried], most: int) -> int:
    """A chunk that ran out of memory in the attempt came back smaller: nothing above that is tried again."""
    return min(most, *(t.chunk for t in tried if t.fell)) if any(t.fell for t in tried) else most


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


def _run(prepared: Prepared, chunk: int, resident: Resident) -> _Tried:
    """Run one chunk."""
    request = prepared.request.model_copy(update={"verify": False, "nan_policy": "propagate"})
    quiet = dataclasses.replace(prepared, request=request, plan=dataclasses.replace(prepared.plan, chunk_size=chunk))
    found: list[int] = []

    def work() -> None:
        found[:] = [run_shard(quiet, Shard(0, 0, chunk)).chunk_size]

    device = prepared.problem.device
    if device.type == "cuda":
        taken, grown = memory.measure(work, device, prepared.leaves), 0
    else:
        taken = memory.measure(lambda: resident.during(work), device, prepared.leaves)
        grown = resident.growth
    return _Tried(min(chunk, found[0]), taken, grown, found[0] < chunk)


class Resident:
    """How much the process's resident memory grew, at its highest, beyond what it was `before`."""

    def __init__(self, before: int) -> None:
        self._before = before
        self.growth = 0

    def during(self, work: Callable[[], None]) -> None:
        """Do some work, and look at the resident memory all the while."""
        self.growth = 0
        # What was freed and is still held would be used again here, and not show.
        memory.trim()
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
            self.growth = max(self.growth, memory.resident() - self._before)
