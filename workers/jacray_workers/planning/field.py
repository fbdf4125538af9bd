"""The methods in competition: each priced, the promising ones tried on a few samples, best first."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from typing import Any

from torch import Tensor

from jacray_workers.blocks.block import Block
from jacray_workers.kernels import NAMES, lacks, pick
from jacray_workers.plan import Candidate
from jacray_workers.planning import memory, pricing, trial
from jacray_workers.planning.case import Case, Tried
from jacray_workers.planning.race import BEHIND, LONG_SECONDS, LOOK_SECONDS, by_rows, paced, race, rematch, scout
from jacray_workers.planning.runner import Look, keeps_factors, kept_as_factors, look, runner
from jacray_workers.straight.kernel import short

# Methods predicted to be slower than the best by more than this are priced but not tried.
FIELD = 6.0
# Once two methods stand, trials of others begin only within this many seconds, or this many of the best one's jobs.
# Not once one does: the first trial of a process also loads what torch loads on first use, a second or more.
FIELD_SECONDS = 2.0
FIELD_JOBS = 2.0
# A first look so many times as long as predicted is repeated, unless it took more than so many seconds.
SURPRISE, RELOOK_SECONDS = 4.0, 3.0
# The seconds that loading torch's compiler takes, for how many jobs it must not stand, and how near to the prediction.
LOAD_SECONDS, LOAD_JOBS, LOAD_NEAR = 1.0, 100, 2.0


def enter(case: Case) -> list[Tried]:
    """Every method priced; the promising ones tried, best first, until the rest cannot win."""
    asked = case.request.method
    names = NAMES if asked == "auto" else (asked,)
    if case.work == "outputs":
        names = ("backward_loop",) if asked == "auto" else names
    found: list[Tried] = []
    best = fastest = math.inf
    began = time.perf_counter()
    plain = has_short_way(case)
    predicted = sorted((_predict(case, name) for name in names), key=lambda c: c.seconds)
    for candidate in sorted(predicted, key=lambda c: (plain and c.method != "chain", _must_load(c))):
        standing = sum(tried.line is not None for tried in found)
        # No other method does fewer products than the short way, nor with fewer calls.
        won = plain and standing > 0
        late = won or (standing >= 2 and time.perf_counter() - began > max(FIELD_SECONDS, FIELD_JOBS * best))
        hopeless = best < math.inf and (candidate.seconds > FIELD * best or _not_worth_loading(candidate, fastest))
        tried = Tried(candidate) if candidate.refused or hopeless or late else _try(case, candidate, fastest)
        found.append(tried)
        if tried.line is not None:
            # The prediction too, for a busy machine stretches what is measured and would let everything be tried.
            best = min(best, tried.candidate.seconds, candidate.seconds)
            fastest = min(fastest, tried.candidate.seconds)
    return rematch(case, found)


def _must_load(candidate: Candidate) -> bool:
    """Whether the method's first use makes torch load its compiler, as `torch.func`'s derivatives do."""
    return candidate.method in ("reverse", "forward") and "torch._dynamo" not in sys.modules


def _not_worth_loading(candidate: Candidate, fastest: float) -> bool:
    """Whether loading would take longer than many jobs, where the best so far is near what is predicted at the best."""
    return _must_load(candidate) and fastest * LOAD_JOBS < LOAD_SECONDS and fastest < LOAD_NEAR * candidate.seconds


def has_short_way(case: Case) -> bool:
    """Whether `chain` knows the model in full and need not trace it."""
    return case.work == "jacobian" and not case.alone and short(case.problem, case.batch) is not None


def _predict(case: Case, method: str) -> Candidate:
    """The price by formula, for the whole job."""
    chunk = min(case.samples, 32)
    passes = ("jvp", "vjp") if case.work == "both" else (case.work,)
    priced = [pricing.price(method, work, case.problem, case.one, chunk, case.directions) for work in passes]
    chunks = case.samples / chunk
    refused = _refuse(case, method)
    if method == "chain" and not refused:
        return _predict_chain(case, sum(price.bytes for price in priced) * chunks)
    return Candidate(
        method,
        refused,
        sum(price.operations for price in priced) * chunks,
        sum(price.bytes for price in priced) * chunks,
        0.0,
        sum(price.launches for price in priced) * chunks,
        sum(price.seconds(case.on) for price in priced) * chunks,
    )


def _predict_chain(case: Case, bytes_moved: float) -> Candidate:
    """The chain knows its own price once it has found its cuts, and refuses where none pays."""
    try:
        found = pick("chain").price(case.problem, case.batch)
    except Exception as error:  # noqa: BLE001 - whatever defeats the tracing is why this method is left out
        found = trial.why(error)
    if isinstance(found, str):
        return Candidate("chain", found)
    samples = case.samples / case.batch[0].shape[0]
    launches = case.one.launches * 8 * max(1.0, case.samples / 32)
    price = pricing.Price(found.operations * samples, bytes_moved, launches)
    return Candidate("chain", "", price.operations, price.bytes, 0.0, price.launches, price.seconds(case.on))


def _refuse(case: Case, method: str) -> str:
    """Reasons that need no running."""
    if case.alone and method in ("layerwise", "chain"):
        return f"it runs whole batches, and {case.standing.why}"
    if case.work != "jacobian" and method == "chain":
        return "a product with vectors needs no chain"
    refused: str = pick(method).refuse(case.problem)
    return refused


def _try(case: Case, candidate: Candidate, best: float) -> Tried:
    """Run on the trial samples: refused with the reason, or timed and measured."""
    problem, kernel = case.problem, pick(candidate.method)
    behind = scout(case, kernel, candidate, best)
    if behind is not None:
        return Tried(dataclasses.replace(candidate, seconds=behind, measured=True))
    single = case.alone and candidate.method == "backward_loop"
    batch = [leaf[:1] for leaf in case.batch] if single else case.batch
    known = None if single else case.known
    run = runner(case, kernel, batch)
    looks: list[Look] = []

    def compare(_: Any) -> float:
        looks[:] = [look(run, problem.device, case.leaves)]
        return max(_disagreement(case, looks[0].blocks, known), _passes_beside(case, kernel, batch, known))

    refused = trial.admits(candidate.method, problem, known, compare)
    if refused:
        return Tried(dataclasses.replace(candidate, refused=refused))
    try:
        return _measured(case, candidate, batch, looks.pop(), best)
    except Exception as error:
        # What the method did for these samples it may not do for more of them, or for other shapes of batch.
        if memory.out_of_memory(error):
            raise
        return Tried(dataclasses.replace(candidate, refused=trial.why(error)))


def _passes_beside(case: Case, kernel: Any, batch: list[Tensor], known: trial.Reference | None) -> float:
    """Try the passes that a request for the Jacobian asks for besides: the largest disagreement of any."""
    if case.work != "jacobian":
        return 0.0
    missing, worst = lacks(kernel.__name__.rpartition(".")[2]), 0.0
    for name, work in (("weighted_gradient", "vjp"), ("jvp", "jvp")):
        if name in case.request.returns and work not in missing:
            beside = dataclasses.replace(case, work=work, known=known)
            worst = max(worst, _disagreement(beside, runner(beside, kernel, batch)(), known))
    return worst


def _measured(case: Case, candidate: Candidate, batch: list[Tensor], first: Look, best: float) -> Tried:
    """What the method holds, at its peak and in its blocks, and how long it takes."""
    problem, kernel = case.problem, pick(candidate.method)
    size = batch[0].shape[0]
    factored = tuple(kept_as_factors(b) for b in first.blocks) if keeps_factors(case, kernel) else ()
    held = sum(b.nbytes_factored for b in first.blocks if isinstance(b, Block) and kept_as_factors(b)) / size
    first.blocks.clear()
    each_row = None
    long = _steady(case, candidate, batch, first.seconds) if first.seconds > LONG_SECONDS else 0.0
    if long > LONG_SECONDS:
        pace = paced(case, candidate, long, size)
        if pace.seconds > BEHIND * best:
            return Tried(dataclasses.replace(candidate, seconds=pace.seconds, measured=True))
        line, each_row = _peaks(case, candidate, batch, first.peak)
    else:
        line, seen, behind = _line(case, kernel, batch)
        if behind > BEHIND * best:
            return Tried(dataclasses.replace(candidate, seconds=behind, measured=True))
        pace = race(case, kernel, candidate, line, seen)
    if case.known is not None and pace.gap > trial.AGREEMENT[case.known.dtype]:
        why = f"disagrees with plain autograd, among more samples, by {pace.gap:.1e} of the size of the result"
        return Tried(dataclasses.replace(candidate, refused=why))
    priced = dataclasses.replace(candidate, seconds=pace.seconds, measured=True)
    describe = getattr(kernel, "cuts", None)
    cuts = describe(problem, batch) if describe and case.work == "jacobian" else ()
    each = held * problem.rows / max(len(case.rows), 1)
    return Tried(priced, line, factored, cuts, each, pace.count, pace.rows, each_row)


def _steady(case: Case, candidate: Candidate, batch: list[Tensor], first: float) -> float:
    """The seconds of long work by its first look, which tells its pace where a first call's own costs weigh little.

    They do not where it took far longer than predicted, as when torch has just loaded what a method needs: then it runs
    once more.
    """
    share = paced(case, candidate, 1.0, batch[0].shape[0]).seconds
    if first > RELOOK_SECONDS or first * share < SURPRISE * candidate.seconds:
        return first
    return min(first, pricing.once(runner(case, pick(candidate.method), batch), case.problem.device))


def _line(case: Case, kernel: Any, batch: list[Tensor]) -> tuple[memory.Line, float, float]:
    """The memory of one sample and of all, the seconds of all, and those of the job by what one sample more costs.

    The last is 0 where the runs were too short to tell.
    """
    single = [leaf[:1] for leaf in batch]
    # Once before: what a first run finds out about a shape of batch takes memory of its own, more than one sample does.
    runner(case, kernel, single)()
    began = time.perf_counter()
    peaks = [(1, _peak(case, kernel, single))]
    middle = time.perf_counter()
    size = batch[0].shape[0]
    if size == 1:
        return memory.fit(peaks), middle - began, 0.0
    peaks.append((size, _peak(case, kernel, batch)))
    last = time.perf_counter() - middle
    more = (last - (middle - began)) / (size - 1)
    share = len(case.rows) / max(case.problem.rows, 1) if case.work == "jacobian" else 1.0
    return memory.fit(peaks), last, more * case.samples / max(share, 1e-9) if last > LOOK_SECONDS else 0.0


def _peaks(case: Case, candidate: Candidate, batch: list[Tensor], peak: int) -> tuple[memory.Line, float | None]:
    """The memory of samples by the peak of these and of one; what each row of one adds, where rows can tell."""
    kernel, size, rows = pick(candidate.method), batch[0].shape[0], case.rows
    single = [leaf[:1] for leaf in batch]
    one = _peak(case, kernel, single) if size > 1 else peak
    line = memory.fit([(1, one), (size, peak)])
    few = range(rows.start, rows.start + max(1, len(rows) // 4))
    if not by_rows(case, candidate) or len(few) == len(rows):
        return line, None
    return line, max(0.0, (one - _peak(case, kernel, single, few)) / (len(rows) - len(few)))


def _peak(case: Case, kernel: Any, batch: list[Tensor], rows: range | None = None) -> int:
    """Bytes of tensors alive at once in a run on these samples."""
    return memory.measure(runner(case, kernel, batch, rows), case.problem.device, case.leaves)


def _disagreement(case: Case, found: list[Tensor], known: trial.Reference | None) -> float:
    if known is None or case.work == "outputs":
        return 0.0
    if case.work == "jacobian":
        return trial.disagreement(found, known)
    pushed = trial.jvp_disagreement(found[0][0], known) if case.work in ("jvp", "both") else 0.0
    if case.work == "jvp":
        return pushed
    pulled = trial.vjp_disagreement(case.problem, found[-len(case.problem.leaves) :], known)
    return max(pushed, pulled)
