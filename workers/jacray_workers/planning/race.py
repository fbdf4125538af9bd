"""How fast a method is: timed on few samples, then on more, for no longer than the job deserves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacray_workers.kernels import pick
from jacray_workers.plan import Candidate
from jacray_workers.planning import memory, pricing, trial
from jacray_workers.planning.case import Case, Tried
from jacray_workers.planning.runner import runner

# A method's race may take as many seconds as this many jobs, within the bounds; or this share of a long job.
TRIAL_JOBS = 20
TRIAL_LEAST = 0.02
TRIAL_SECONDS = 0.1
TRIAL_SHARE = 0.05
TRIAL_MOST = 0.5
# Bytes of result and samples that a race writes at the most: fresh memory costs more than it tells.
RACED_BYTES = 1 << 27
RACED_SAMPLES = 64
# From one number of samples to the next; no method takes more than so many times as long for them.
GROWTH = 4
# A method this many times slower than the best so far is not looked at more closely, once a look takes so long.
BEHIND = 2.0
LOOK_SECONDS = 0.02
# Work that took longer than this when it was compared is not run again to be measured and timed.
LONG_SECONDS = 0.15
# Methods this close to the best run again in turns, for a busy moment may have met only one of them.
CLOSE = 1.6
TURNS = 4
# The seconds that this may take; or this share of a long job, within the bound.
REMATCH_SECONDS = 0.2
REMATCH_SHARE = 0.1
REMATCH_MOST = 1.0


@dataclass(frozen=True)
class Pace:
    """What a race showed: seconds for the whole job, disagreement, and the heat that the seconds come from."""

    seconds: float
    gap: float = 0.0
    count: int = 0
    rows: range = range(0)


def scout(case: Case, kernel: Any, candidate: Candidate, best: float) -> float | None:
    """The seconds of a method that goes sample by sample, where a few rows of one show that it stays behind.

    None where that is not so, or cannot be told without the comparison.
    """
    alone = candidate.method == "backward_loop" and any(leaf.side == "param" for leaf in case.problem.leaves)
    if not alone or case.work != "jacobian" or best == float("inf"):
        return None
    rows = case.rows[:2]
    run = runner(case, kernel, [leaf[:1] for leaf in case.batch], rows)
    try:
        took = min(pricing.once(run, case.problem.device) for _ in range(2))
    except Exception as error:
        if memory.out_of_memory(error):
            raise
        return None
    seconds = took * case.samples * case.problem.rows / max(len(rows), 1)
    return seconds if took > LOOK_SECONDS / 4 and seconds > BEHIND * best else None


def race(case: Case, kernel: Any, candidate: Candidate, line: memory.Line, seen: float) -> Pace:
    """Run on a few samples, and on more of them as long as the time allowed lasts; `seen` is what the trial's took."""
    problem = case.problem
    allowed = _allowed(candidate.seconds)
    rows, most = _heat(case, candidate, line, allowed)
    bare = dataclasses.replace(case, known=None)
    # Straight to as many as the prediction says, unless the trial has shown it wrong already.
    quick = int(allowed * case.samples / max(candidate.seconds, 1e-9)) if seen < allowed else 0
    count, spent = min(most, max(GROWTH, quick)), 0.0
    while True:
        run = runner(bare, kernel, trial.first_samples(problem, case.leaves, count), rows, reuse=True)
        found: list[Tensor] = []
        best = pricing.once(lambda run=run, found=found: found.extend(run()), problem.device)  # type: ignore[misc]
        spent += best
        if count >= most or spent + GROWTH * best > allowed:
            break
        del run, found
        count = min(most, GROWTH * count)
    gap = _gap_among(case, found, count)
    del found
    # A method that was asked for has nobody to beat: its pace need not be known to the last percent.
    left = max(allowed - spent, 0.0) if case.request.method == "auto" else 0.0
    best = min(best, pricing.best_of(run, problem.device, left))
    return Pace(_whole(case, candidate, best, count, rows), gap, count, rows)


def paced(case: Case, candidate: Candidate, seconds: float, count: int) -> Pace:
    """The pace by one run of the trial's rows on so many samples."""
    return Pace(_whole(case, candidate, seconds, count, case.rows), 0.0, count, case.rows)


def rematch(case: Case, field: Sequence[Tried]) -> list[Tried]:
    """The same field, where those that came out close to the best have run again, one after the other in turns."""
    fast = min((t.candidate.seconds for t in field if t.line is not None), default=0.0)
    close = [t for t in field if t.line is not None and t.count and t.candidate.seconds <= CLOSE * fast]
    # Long runs too: they were timed once, while watched, which costs a method of many calls more than one of few.
    limit = max(min(REMATCH_SECONDS, TRIAL_JOBS * fast), min(REMATCH_SHARE * fast, REMATCH_MOST))
    close = _affordable(case, close, limit)
    if len(close) < 2:
        return list(field)
    runs = {t.candidate.method: _again(case, t) for t in close}
    seconds = {t.candidate.method: t.candidate.seconds for t in close}
    began = time.perf_counter()
    for _ in range(TURNS):
        for t in close:
            took = pricing.once(runs[t.candidate.method], case.problem.device)
            whole = _whole(case, t.candidate, took, t.count, t.rows)
            seconds[t.candidate.method] = min(seconds[t.candidate.method], whole)
        if time.perf_counter() - began > limit:
            break
    return [
        dataclasses.replace(
            t, candidate=dataclasses.replace(t.candidate, seconds=seconds.get(t.candidate.method, t.candidate.seconds))
        )
        for t in field
    ]


def _affordable(case: Case, close: Sequence[Tried], limit: float) -> list[Tried]:
    """The fastest of them, as many as run once each within the limit."""
    found: list[Tried] = []
    for tried in sorted(close, key=lambda t: t.candidate.seconds):
        limit -= tried.candidate.seconds / _whole(case, tried.candidate, 1.0, tried.count, tried.rows)
        if limit < 0:
            break
        found.append(tried)
    return found


def _again(case: Case, tried: Tried) -> Any:
    batch = trial.first_samples(case.problem, case.leaves, tried.count)
    return runner(dataclasses.replace(case, known=None), pick(tried.candidate.method), batch, tried.rows, reuse=True)


def _allowed(predicted: float) -> float:
    """Seconds that a race may take for a job of so many."""
    least = max(min(TRIAL_SECONDS, TRIAL_LEAST), min(TRIAL_SECONDS, TRIAL_JOBS * predicted))
    return max(least, min(TRIAL_SHARE * predicted, TRIAL_MOST))


def _heat(case: Case, candidate: Candidate, line: memory.Line, allowed: float) -> tuple[range, int]:
    """The rows that a race computes, and the most samples."""
    problem = case.problem
    if case.alone and candidate.method == "backward_loop":
        return case.rows, 1
    heavy = candidate.seconds / case.samples > allowed
    row = sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize
    rows = case.rows if heavy or row * problem.rows > RACED_BYTES // GROWTH else range(problem.rows)
    result = max(1, len(rows) * row) if case.work == "jacobian" else max(1, row)
    room = min(RACED_BYTES, case.budget // 8) // result
    return rows, max(1, min(case.samples, RACED_SAMPLES, room, line.fit_in(case.budget // 3)))


def _whole(case: Case, candidate: Candidate, seconds: float, count: int, rows: range) -> float:
    """Seconds of the whole job by those of some samples and rows."""
    total = case.problem.rows
    share = len(rows) / total if total and by_rows(case, candidate) else 1.0
    return seconds / count * case.samples / max(share, 1e-9)


def _gap_among(case: Case, found: list[Tensor], count: int) -> float:
    """How far the trial's samples come out among many from what plain autograd says of them."""
    known = case.known
    size = case.batch[0].shape[0]
    # Where chunks are compared with their samples, one that differs is no reason to leave the method out.
    if known is None or case.work != "jacobian" or count <= size or case.problem.compared:
        return 0.0
    return trial.disagreement([block[:size, : known.rows.stop] for block in found], known)


def by_rows(case: Case, candidate: Candidate) -> bool:
    """Whether the method can compute some rows alone at a share of the cost."""
    return case.work == "jacobian" and candidate.method not in ("chain", "forward")
