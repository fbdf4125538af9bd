"""Choose the method: price all, try the promising ones on a few samples, keep the fastest that is right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacray_workers import products
from jacray_workers.blocks.block import Block, DenseBlock
from jacray_workers.errors import MethodError, ModelError, Plain
from jacray_workers.kernels import NAMES, lacks, pick
from jacray_workers.kernels.common import blocks_for
from jacray_workers.plan import ArrayPlan, Candidate, Plan
from jacray_workers.planning import memory, pricing, sizing, trial
from jacray_workers.planning.ladder import Standing, stand
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.weights import Directions
from jacray_workers.request import Request, budget_bytes

# Methods predicted to be slower than the best by more than this are priced but not tried.
FIELD = 6.0
# A trial may take this many seconds, or this share of the predicted job.
TRIAL_SECONDS = 0.1
TRIAL_SHARE = 0.05
TRIAL_ROWS = 64


@dataclass(frozen=True)
class Case:
    """What the planner knows about one job."""

    problem: Problem
    leaves: Sequence[Tensor]
    request: Request
    arrays: tuple[ArrayPlan, ...]
    workers: int
    work: str
    directions: int
    budget: int
    one: pricing.Forward
    on: pricing.Machine
    batch: list[Tensor]
    known: trial.Reference | None
    standing: Standing
    alike: tuple[bool, ...]

    @property
    def samples(self) -> int:
        """How many samples the job has."""
        return self.leaves[0].shape[0]

    @property
    def rows(self) -> range:
        """The rows that a trial of a row-by-row method computes."""
        return self.known.rows if self.known is not None else range(self.problem.rows)


def choose(
    problem: Problem,
    leaves: Sequence[Tensor],
    request: Request,
    arrays: tuple[ArrayPlan, ...],
    workers: int,
    ks: Directions | None,
    vs: Directions | None,
) -> Plan:
    """Make the plan.

    Raises:
        CoupledSamplesError: samples are not independent.
        MethodError: the method asked for cannot do this work; names one that can.
        BudgetError: the work cannot fit the memory budget.
    """
    work = products.work(problem, request)
    budget = _budget(request, problem, workers)
    products.refuse_large(problem, request, arrays, budget)
    with problem.session():
        batch = trial.first_samples(problem, leaves, min(leaves[0].shape[0], 2))
        standing = stand(problem, trial.first_samples(problem, leaves, min(leaves[0].shape[0], 4)))
        rows = _trial_rows(problem, work, budget)
        _require_no_stray(problem, batch)
        one = pricing.forward_cost(problem, [leaf[:1] for leaf in batch])
        case = Case(
            problem,
            leaves,
            request,
            arrays,
            workers,
            work,
            _directions(problem, request, ks, vs),
            budget,
            one,
            pricing.machine(problem.device, torch.get_num_threads()),
            batch,
            trial.reference(problem, batch, request.seed, rows, one.coarsest),
            standing,
            tuple(part.shape[1] == 1 for part in vs.parts) if vs else (False,) * len(problem.leaves),
        )
        field = _field(case)
        runners = [tried for tried in field if tried.line is not None]
        if not runners:
            raise _none_left(case, field)
        return _plan(case, field, min(runners, key=lambda tried: tried.candidate.seconds))


def _require_no_stray(problem: Problem, batch: list[Tensor]) -> None:
    found = trial.stray(problem, batch)
    if found:
        raise ModelError(
            "model",
            "must use a parameter through the module that owns it, but reads this one from elsewhere too",
            Plain(found),
            "keep it as an attribute or in an nn.ParameterList, not in a plain list, a dict or a closure",
        )


@dataclass(frozen=True)
class Tried:
    """A candidate with what its trial showed; `line` is None where it was refused or not tried.

    `factored` says which leaves' blocks stay factors, and `factor_bytes` how many bytes those take for one sample.
    """

    candidate: Candidate
    line: memory.Line | None = None
    factored: tuple[bool, ...] = ()
    cuts: tuple[str, ...] = ()
    factor_bytes: float = 0.0


def _directions(problem: Problem, request: Request, ks: Directions | None, vs: Directions | None) -> int:
    """How many cotangents or tangents are in flight at a time."""
    vectors = vs.count if vs else 1
    pushed = vectors if "jvp" in request.returns else 1
    return max(ks.count if ks else 1, pushed, products.width(problem, request, vectors))


def _budget(request: Request, problem: Problem, workers: int) -> int:
    free = memory.free_bytes(problem.device)
    if request.memory_budget is None:
        return int(free * memory.SAFE_SHARE / workers)
    return budget_bytes(request.memory_budget, free)


def _trial_rows(problem: Problem, work: str, budget: int) -> range:
    """Few enough rows that a trial's blocks stay a small part of the budget."""
    if work != "jacobian":
        return range(problem.rows)
    row = sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize * 2
    return range(min(problem.rows, max(1, min(TRIAL_ROWS, budget // (8 * max(row, 1))))))


def _field(case: Case) -> list[Tried]:
    """Every method priced; the promising ones tried, best first, until the rest cannot win."""
    asked = case.request.method
    names = NAMES if asked == "auto" else (asked,)
    if case.work == "outputs":
        names = ("backward_loop",) if asked == "auto" else names
    found: list[Tried] = []
    best = math.inf
    for candidate in sorted((_predict(case, name) for name in names), key=lambda c: c.seconds):
        hopeless = best < math.inf and candidate.seconds > FIELD * best
        tried = Tried(candidate) if candidate.refused or hopeless else _try(case, candidate)
        found.append(tried)
        if tried.line is not None:
            # The prediction too, for a busy machine stretches what is measured and would let everything be tried.
            best = min(best, tried.candidate.seconds, candidate.seconds)
    return found


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
    if not case.standing.batched and method in ("layerwise", "chain"):
        return f"it runs whole batches, and {case.standing.why}"
    if case.work != "jacobian" and method == "chain":
        return "a product with vectors needs no chain"
    refused: str = pick(method).refuse(case.problem)
    return refused


def _try(case: Case, candidate: Candidate) -> Tried:
    """Run on the trial samples: refused with the reason, or timed and measured."""
    problem, kernel = case.problem, pick(candidate.method)
    single = not case.standing.batched and candidate.method == "backward_loop"
    batch = [leaf[:1] for leaf in case.batch] if single else case.batch
    known = None if single else case.known
    run = _runner(case, kernel, batch)
    kept: list[list[Tensor]] = []

    def compare(_: Any) -> float:
        kept[:] = [run()]
        _passes_beside(case, kernel, batch)
        return _disagreement(case, kept[0], known)

    refused = trial.admits(candidate.method, problem, known, compare)
    if refused:
        return Tried(dataclasses.replace(candidate, refused=refused))
    try:
        return _measured(case, candidate, batch, kept.pop())
    except Exception as error:
        # What the method did for these samples it may not do for more of them, or for other shapes of batch.
        if memory.out_of_memory(error):
            raise
        return Tried(dataclasses.replace(candidate, refused=trial.why(error)))


def _passes_beside(case: Case, kernel: Any, batch: list[Tensor]) -> None:
    """Run the passes that a request for the Jacobian asks for besides, so that none of them fails in a shard."""
    if case.work != "jacobian":
        return
    missing = lacks(kernel.__name__.rpartition(".")[2])
    for name, work in (("weighted_gradient", "vjp"), ("jvp", "jvp")):
        if name in case.request.returns and work not in missing:
            _runner(dataclasses.replace(case, work=work, known=None), kernel, batch)()


def _measured(case: Case, candidate: Candidate, batch: list[Tensor], blocks: list[Tensor]) -> Tried:
    """What the method holds, at its peak and in its blocks, and how long it takes."""
    problem, kernel = case.problem, pick(candidate.method)
    run = _runner(case, kernel, batch)
    size = batch[0].shape[0]
    factored = tuple(_kept_as_factors(b) for b in blocks) if _factors(case, kernel) else ()
    held = sum(b.nbytes_factored for b in blocks if isinstance(b, Block) and _kept_as_factors(b)) / size
    del blocks
    few = [leaf[:1] for leaf in batch]
    peaks = [(1, memory.measure(_runner(case, kernel, few), problem.device))]
    if size > 1:
        peaks.append((size, memory.measure(run, problem.device)))
    line = memory.fit(peaks)
    priced = dataclasses.replace(candidate, seconds=_race(case, kernel, candidate), measured=True)
    describe = getattr(kernel, "cuts", None)
    cuts = describe(problem, batch) if describe and case.work == "jacobian" else ()
    return Tried(priced, line, factored, cuts, held * problem.rows / max(len(case.rows), 1))


def _kept_as_factors(block: Tensor) -> bool:
    return isinstance(block, Block) and not isinstance(block, DenseBlock)


def _runner(
    case: Case, kernel: Any, batch: list[Tensor], trial_rows: range | None = None, *, reuse: bool = False
) -> Callable[[], list[Tensor]]:
    """The kernel's work on these samples, and for methods that go by rows on these rows.

    With `reuse` it writes to one set of buffers again and again, as a shard does.
    """
    trial_rows = case.rows if trial_rows is None else trial_rows
    problem, request = case.problem, case.request
    size = batch[0].shape[0]
    u = torch.ones(case.directions, size, problem.rows, dtype=problem.dtype, device=problem.device)
    if case.known is not None and size == len(case.batch[0]):
        u = case.known.cotangent.expand(case.directions, -1, -1)
    if case.work == "vjp":
        return lambda: kernel.vjp(problem, batch, u, per_sample_params=request.reduction == "none")
    if case.work in ("jvp", "both"):
        vs = [
            torch.ones(case.directions, width, *leaf.shape, dtype=leaf.dtype, device=problem.device).expand(
                -1, size, *leaf.shape
            )
            for leaf, width in zip(problem.leaves, (1 if alike else size for alike in case.alike), strict=True)
        ]
        if case.work == "jvp":
            return lambda: [kernel.jvp(problem, batch, vs)]
        keep = "singular_values" in request.returns or request.reduction == "none"
        return lambda: [kernel.jvp(problem, batch, vs), *kernel.vjp(problem, batch, u, per_sample_params=keep)]
    if case.work == "outputs":
        return lambda: [problem.forward(problem.values(batch), batch)]
    if _factors(case, kernel):
        return lambda: kernel.jacobian(problem, batch, trial_rows, form=request.form)
    rows = None if kernel.__name__.endswith(("chain", "forward")) else trial_rows
    into = blocks_for(problem, size, problem.rows if rows is None else len(rows), None) if reuse else None
    return lambda: kernel.jacobian(problem, batch, rows, into)


def _factors(case: Case, kernel: Any) -> bool:
    """Whether the kernel may answer with factors."""
    return (
        case.work == "jacobian"
        and case.request.form != "dense"
        and kernel.__name__.endswith("layerwise")
        and any(leaf.side == "param" for leaf in case.problem.leaves)
    )


def _disagreement(case: Case, found: list[Tensor], known: trial.Reference | None) -> float:
    if known is None or case.work == "outputs":
        return 0.0
    if case.work == "jacobian":
        return trial.disagreement(found, known)
    pushed = trial.jvp_disagreement(found[0][0], known) if case.work in ("jvp", "both") else 0.0
    if case.work == "jvp":
        return pushed
    summed = found[-1].dim() == len(case.problem.leaves[-1].shape) + 1
    pulled = trial.vjp_disagreement(case.problem, found[-len(case.problem.leaves) :], known, summed)
    return max(pushed, pulled)


def _race(case: Case, kernel: Any, candidate: Candidate) -> float:
    """Seconds for the whole job, from a run on as many samples and rows as a trial may take."""
    problem = case.problem
    allowed = max(TRIAL_SECONDS, TRIAL_SHARE * candidate.seconds)
    per_sample = max(candidate.seconds / case.samples, 1e-9)
    rows = case.rows if per_sample > allowed else range(problem.rows)
    share = len(rows) / problem.rows if problem.rows and _by_rows(case, candidate) else 1.0
    heavy = max(1, len(rows) * sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize)
    count = max(1, min(case.samples, 64, int(allowed / (per_sample * share)), case.budget // (8 * heavy)))
    if not case.standing.batched and candidate.method == "backward_loop":
        count = 1
    batch = trial.first_samples(problem, case.leaves, count)
    run = _runner(dataclasses.replace(case, known=None), kernel, batch, rows, reuse=True)
    return pricing.best_of(run, problem.device, allowed) / count * case.samples / max(share, 1e-9)


def _by_rows(case: Case, candidate: Candidate) -> bool:
    """Whether the method can compute some rows alone at a share of the cost."""
    return case.work == "jacobian" and candidate.method not in ("chain", "forward")


def _plan(case: Case, field: Sequence[Tried], best: Tried) -> Plan:
    """The frozen plan around the method that won."""
    problem, request = case.problem, case.request
    arrays = tuple(_factored(a, best) for a in case.arrays)
    line, rows = _banded(case, best)
    kept = best.factored or (False,) * len(problem.leaves)
    dense = sum(leaf.size for leaf, factored in zip(problem.leaves, kept, strict=True) if not factored)
    line = products.memory(problem, request, line, case.budget, dense)
    held = sum(sizing.array_bytes(a) for a in arrays if a.axis < 0)
    factors = math.ceil(best.factor_bytes) if any(a.factored for a in arrays) else 0
    per_sample = sizing.bytes_per_sample([a for a in arrays if not a.factored], case.samples) + factors
    chosen = sizing.sizes(
        case.samples, case.workers, _fixed_chunk(case, best.candidate.method), line, held, per_sample, case.budget, rows
    )
    candidates = tuple(
        dataclasses.replace(t.candidate, peak_bytes=t.line.at(chosen.chunk) if t.line else 0) for t in field
    )
    return Plan(
        method=best.candidate.method,
        reason=_reason(case, field, best),
        candidates=candidates,
        samples=case.samples,
        rows=problem.rows,
        chunk_size=chosen.chunk,
        row_chunk=rows,
        shard_size=chosen.shard,
        arrays=arrays,
        bytes_out=sum(sizing.array_bytes(a) for a in arrays if not a.factored) + factors * case.samples,
        peak_bytes=chosen.peak,
        budget_bytes=case.budget,
        device=str(problem.device),
        dtype=str(problem.dtype).removeprefix("torch."),
        form=request.form if any(best.factored) else "dense",
        seed=request.seed,
        batched=case.standing.batched,
        cuts=best.cuts,
        notes=_notes(case),
    )


def _factored(array: ArrayPlan, best: Tried) -> ArrayPlan:
    kept = array.name == "jacobian" and bool(best.factored) and best.factored[array.leaf]
    return dataclasses.replace(array, factored=True) if kept else array


def _fixed_chunk(case: Case, method: str) -> int | None:
    if not case.standing.batched and method == "backward_loop":
        return 1
    return case.request.chunk_size


def _banded(case: Case, best: Tried) -> tuple[memory.Line, int]:
    """The memory line for all rows, or for as many at a time as the budget takes for one sample."""
    problem = case.problem
    line, total = best.line or memory.Line(0, 0), problem.rows
    seen = len(case.rows)
    if case.work != "jacobian" or best.candidate.method in ("chain", "forward") or seen >= total:
        return line, max(total, 1)
    whole = memory.Line(line.base, line.slope * total / seen)
    if whole.fit_in(case.budget // 2) >= 1 or seen == 0 or not products.separable(problem, case.request):
        return whole, total
    rows = max(1, int(seen * (case.budget // 4) / max(line.at(1), 1)))
    return memory.Line(line.base, line.slope * rows / seen), min(rows, total)


def _reason(case: Case, field: Sequence[Tried], best: Tried) -> str:
    if case.request.method != "auto":
        return "asked for"
    others = [t for t in field if t.line is not None and t is not best]
    if not others:
        return "the only method that serves this work within reach"
    second = min(others, key=lambda t: t.candidate.seconds).candidate
    factor = second.seconds / best.candidate.seconds if best.candidate.seconds else 1.0
    return f"fastest on the first samples, {factor:.1f} times as fast as {second.method}"


def _notes(case: Case) -> tuple[str, ...]:
    notes = list(case.problem.notes)
    if case.known is None:
        notes.append("plain autograd cannot run this model backward, so methods were not compared with it")
    notes += case.standing.notes
    if not case.standing.batched:
        notes.append(f"{case.standing.why}: each sample is computed as a batch of one")
    return tuple(notes)


def _none_left(case: Case, field: Sequence[Tried]) -> MethodError:
    """What failed on what, and for an explicit method the one that would work."""
    asked = case.request.method
    if asked != "auto":
        auto = dataclasses.replace(case, request=case.request.model_copy(update={"method": "auto"}))
        able = [t.candidate for t in _field(auto) if t.line is not None]
        way_out = f"use method='auto', or {min(able, key=lambda c: c.seconds).method}, which can" if able else ""
        return MethodError("method", f"{asked} cannot do this work: {field[0].candidate.refused}", asked, way_out)
    reasons = "; ".join(f"{t.candidate.method}: {t.candidate.refused}" for t in field)
    return MethodError("model", f"no method can differentiate it ({reasons})", None, "")
