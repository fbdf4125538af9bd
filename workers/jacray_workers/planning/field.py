"""The methods in competition: each priced, the promising ones tried on a few samples, best first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacray_workers.blocks.block import Block, DenseBlock
from jacray_workers.kernels import NAMES, lacks, pick
from jacray_workers.kernels.common import blocks_for
from jacray_workers.plan import Candidate
from jacray_workers.planning import memory, pricing, trial
from jacray_workers.planning.case import Case, Tried

# Methods predicted to be slower than the best by more than this are priced but not tried.
FIELD = 6.0
# A trial may take this many seconds, or this share of the predicted job.
TRIAL_SECONDS = 0.1
TRIAL_SHARE = 0.05


def enter(case: Case) -> list[Tried]:
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
    if case.alone and method in ("layerwise", "chain"):
        return f"it runs whole batches, and {case.standing.why}"
    if case.work != "jacobian" and method == "chain":
        return "a product with vectors needs no chain"
    refused: str = pick(method).refuse(case.problem)
    return refused


def _try(case: Case, candidate: Candidate) -> Tried:
    """Run on the trial samples: refused with the reason, or timed and measured."""
    problem, kernel = case.problem, pick(candidate.method)
    single = case.alone and candidate.method == "backward_loop"
    batch = [leaf[:1] for leaf in case.batch] if single else case.batch
    known = None if single else case.known
    run = _runner(case, kernel, batch)
    kept: list[list[Tensor]] = []

    def compare(_: Any) -> float:
        kept[:] = [run()]
        return max(_disagreement(case, kept[0], known), _passes_beside(case, kernel, batch, known))

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


def _passes_beside(case: Case, kernel: Any, batch: list[Tensor], known: trial.Reference | None) -> float:
    """Try the passes that a request for the Jacobian asks for besides: the largest disagreement of any."""
    if case.work != "jacobian":
        return 0.0
    missing, worst = lacks(kernel.__name__.rpartition(".")[2]), 0.0
    for name, work in (("weighted_gradient", "vjp"), ("jvp", "jvp")):
        if name in case.request.returns and work not in missing:
            beside = dataclasses.replace(case, work=work, known=known)
            worst = max(worst, _disagreement(beside, _runner(beside, kernel, batch)(), known))
    return worst


def _measured(case: Case, candidate: Candidate, batch: list[Tensor], blocks: list[Tensor]) -> Tried:
    """What the method holds, at its peak and in its blocks, and how long it takes."""
    problem, kernel = case.problem, pick(candidate.method)
    run = _runner(case, kernel, batch)
    size = batch[0].shape[0]
    factored = tuple(_kept_as_factors(b) for b in blocks) if _keeps_factors(case, kernel) else ()
    held = sum(b.nbytes_factored for b in blocks if isinstance(b, Block) and _kept_as_factors(b)) / size
    del blocks
    few = [leaf[:1] for leaf in batch]
    peaks = [(1, memory.measure(_runner(case, kernel, few), problem.device))]
    if size > 1:
        peaks.append((size, memory.measure(run, problem.device)))
    line = memory.fit(peaks)
    seconds, gap = _race(case, kernel, candidate, line)
    if case.known is not None and gap > trial.AGREEMENT[case.known.dtype]:
        why = f"disagrees with plain autograd, among more samples, by {gap:.1e} of the size of the result"
        return Tried(dataclasses.replace(candidate, refused=why))
    priced = dataclasses.replace(candidate, seconds=seconds, measured=True)
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
    if _keeps_factors(case, kernel):
        return lambda: kernel.jacobian(problem, batch, trial_rows, form=request.form)
    rows = None if kernel.__name__.endswith(("chain", "forward")) else trial_rows
    into = blocks_for(problem, size, problem.rows if rows is None else len(rows), None) if reuse else None
    for block in into or ():
        # Mapped now: the first write to fresh memory would count against the method that happens to come first.
        block.zero_()
    return lambda: kernel.jacobian(problem, batch, rows, into)


def _keeps_factors(case: Case, kernel: Any) -> bool:
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
    pulled = trial.vjp_disagreement(case.problem, found[-len(case.problem.leaves) :], known)
    return max(pushed, pulled)


def _race(case: Case, kernel: Any, candidate: Candidate, line: memory.Line) -> tuple[float, float]:
    """Seconds for the whole job, from a run on as many samples and rows as a trial may take, and its disagreement."""
    problem = case.problem
    allowed = max(TRIAL_SECONDS, TRIAL_SHARE * candidate.seconds)
    per_sample = max(candidate.seconds / case.samples, 1e-9)
    rows = case.rows if per_sample > allowed else range(problem.rows)
    share = len(rows) / problem.rows if problem.rows and by_rows(case, candidate) else 1.0
    heavy = max(1, len(rows) * sum(leaf.size for leaf in problem.leaves) * problem.dtype.itemsize)
    count = max(1, min(case.samples, 64, int(allowed / (per_sample * share)), case.budget // (8 * heavy)))
    count = max(1, min(count, line.fit_in(case.budget // 3)))
    if case.alone and candidate.method == "backward_loop":
        count = 1
    batch = trial.first_samples(problem, case.leaves, count)
    run = _runner(dataclasses.replace(case, known=None), kernel, batch, rows, reuse=True)
    found: list[Tensor] = []

    def keep() -> None:
        found[:] = run()

    seconds = pricing.best_of(keep, problem.device, allowed) / count * case.samples / max(share, 1e-9)
    return seconds, _gap_among(case, found, count)


def _gap_among(case: Case, found: list[Tensor], count: int) -> float:
    """How far the trial's samples come out among many from what plain autograd says of them."""
    known = case.known
    size = case.batch[0].shape[0]
    if known is None or case.work != "jacobian" or count <= size:
        return 0.0
    return trial.disagreement([block[:size, : known.rows.stop] for block in found], known)


def by_rows(case: Case, candidate: Candidate) -> bool:
    """Whether the method can compute some rows alone at a share of the cost."""
    return case.work == "jacobian" and candidate.method not in ("chain", "forward")
