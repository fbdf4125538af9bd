"""Choose the method: price all, try the promising ones on a few samples, keep the fastest that is right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jacray_workers import products
from jacray_workers.errors import MethodError, ModelError, Plain
from jacray_workers.kernels import forward
from jacray_workers.models import torchvision_operators
from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.planning import heap, memory, pricing, sizing, trial
from jacray_workers.planning.case import Case, Tried, budget_of, directions, trial_rows
from jacray_workers.planning.field import enter, has_short_way
from jacray_workers.planning.ladder import READS, Standing, stand
from jacray_workers.planning.relook import look
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.weights import Directions
from jacray_workers.request import Request

# Backward passes of a chunk from which on it pays to compare its samples with each alone.
PASSES = 8


def choose(
    problem: Problem,
    leaves: Sequence[Tensor],
    request: Request,
    arrays: tuple[ArrayPlan, ...],
    workers: int,
    ks: Directions | None,
    vs: Directions | None,
    *,
    apart: bool = False,
) -> Plan:
    """Make the plan. Where shards are computed `apart` from where the result is kept, each is small enough to travel.

    Raises:
        CoupledSamplesError: samples are not independent.
        MethodError: the method asked for cannot do this work; names one that can.
        BudgetError: the work cannot fit the memory budget.
    """
    budget = budget_of(request, problem, workers)
    heap.settle(budget)
    products.refuse_large(problem, request, arrays, budget)
    with problem.session():
        case = _look(problem, leaves, request, arrays, workers, budget, ks, vs)
        case = dataclasses.replace(case, apart=apart or workers > 1)
        plan = _decide(case)
        why = look(problem, leaves, plan)
        if why:
            plan = _decide(case.apart_for(why))
        return plan


def _look(
    problem: Problem,
    leaves: Sequence[Tensor],
    request: Request,
    arrays: tuple[ArrayPlan, ...],
    workers: int,
    budget: int,
    ks: Directions | None,
    vs: Directions | None,
) -> Case:
    """Everything that a few passes over a few samples tell."""
    work = products.work(problem, request)
    standing = stand(problem, trial.first_samples(problem, leaves, min(leaves[0].shape[0], 4)))
    vectors = directions(problem, request, ks, vs)
    standing = _worth(standing, request, problem.rows if work == "jacobian" else vectors * (work != "outputs"))
    problem = dataclasses.replace(problem, compared=standing.compared)
    batch = trial.first_samples(problem, leaves, min(leaves[0].shape[0], 2))
    _require_seen(problem, batch)
    one = pricing.forward_cost(problem, [leaf[:1] for leaf in batch])
    on = pricing.machine(problem.device, torch.get_num_threads())
    rows = trial_rows(problem, work, budget, len(batch[0]) * pricing.backward_seconds(problem, one, on))
    return Case(
        problem=problem,
        leaves=leaves,
        request=request,
        arrays=arrays,
        workers=workers,
        work=work,
        directions=vectors,
        budget=budget,
        one=one,
        on=on,
        batch=batch,
        known=trial.reference(problem, batch, request.seed, rows, one.coarsest),
        standing=standing,
        alike=tuple(part.shape[1] == 1 for part in vs.parts) if vs else (False,) * len(problem.leaves),
    )


def _worth(standing: Standing, request: Request, passes: int) -> Standing:
    """Comparing every sample costs a pass of each alone; few passes of a chunk do not make up for that."""
    if not standing.compared or request.method != "auto" or passes >= PASSES:
        return standing
    return Standing(False, READS)


def _require_seen(problem: Problem, batch: list[Tensor]) -> None:
    """Refuse models whose derivatives automatic differentiation does not see whole.

    Raises:
        ModelError: a parameter is read past its module, or nothing leads from the outputs back to the leaves.
    """
    found = trial.stray(problem, batch)
    if found:
        raise ModelError(
            "model",
            "must use a parameter through the module that owns it, but reads this one from elsewhere too",
            Plain(found),
            "keep it as an attribute or in an nn.ParameterList, not in a plain list, a dict or a closure",
        )
    if trial.cut_off(problem, [leaf[:1] for leaf in batch]):
        keys = ", ".join(leaf.key for leaf in problem.leaves[:3])
        raise ModelError(
            "model",
            f"must let derivatives through, but nothing that torch recorded leads from its outputs to {keys},"
            " although they change with it",
            None,
            "take out the detach(), torch.no_grad(), torch.inference_mode() or numpy that stands between",
        )


def _decide(case: Case) -> Plan:
    """Let the methods compete, and plan around the winner."""
    field = enter(case)
    runners = [tried for tried in field if tried.line is not None]
    if not runners and not case.alone:
        why = f"no method serves a whole batch ({field[0].candidate.method}: {field[0].candidate.refused})"
        case = case.apart_for(why)
        runners = [tried for tried in enter(case) if tried.line is not None]
    if not runners:
        raise _none_left(case, field)
    return _plan(case, field, min(runners, key=lambda tried: tried.candidate.seconds))


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
    ranges = sizing.row_cuts(arrays, case.apart)
    per_sample = sizing.largest_part(arrays, case.samples, ranges) + factors
    chosen = sizing.sizes(
        case.samples,
        case.workers,
        case.apart,
        _fixed_chunk(case, best.candidate.method),
        line,
        held,
        per_sample,
        case.budget,
        rows,
        _direct(case, best, arrays),
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
        chunk_size=1 if ranges else chosen.chunk,
        row_chunk=rows,
        shard_size=1 if ranges else chosen.shard,
        arrays=arrays,
        bytes_out=sum(sizing.array_bytes(a) for a in arrays if not a.factored) + factors * case.samples,
        peak_bytes=chosen.peak,
        budget_bytes=case.budget,
        device=str(problem.device),
        dtype=str(problem.dtype).removeprefix("torch."),
        form=request.form if any(best.factored) else "dense",
        seed=request.seed,
        batched=case.standing.batched,
        compared=case.standing.compared,
        cuts=best.cuts,
        row_cuts=ranges,
        notes=_notes(case),
    )


def _direct(case: Case, best: Tried, arrays: Sequence[ArrayPlan]) -> int:
    """Bytes per sample of the dense blocks of parameters that a method writes into the result's own memory."""
    problem = case.problem
    writes = best.candidate.method in ("layerwise", "backward_loop") and case.work == "jacobian"
    own = all(leaf.side == "param" for leaf in problem.leaves) and len(problem.outs) == 1
    if not (writes and own and problem.device.type == "cpu"):
        return 0
    return sizing.bytes_per_sample([a for a in arrays if a.name == "jacobian" and not a.factored], case.samples)


def _factored(array: ArrayPlan, best: Tried) -> ArrayPlan:
    kept = array.name == "jacobian" and bool(best.factored) and best.factored[array.leaf]
    return dataclasses.replace(array, factored=True) if kept else array


def _fixed_chunk(case: Case, method: str) -> int | None:
    if case.alone and method == "backward_loop":
        return 1
    return case.request.chunk_size


def _banded(case: Case, best: Tried) -> tuple[memory.Line, int]:
    """The memory line for all rows, or for as many at a time as the budget takes for one sample."""
    problem = case.problem
    line, total = best.line or memory.Line(0, 0), problem.rows
    seen = len(case.rows)
    if case.work == "jacobian" and best.candidate.method == "forward":
        return _tangents(case, line)
    if case.work != "jacobian" or best.candidate.method == "chain" or seen >= total:
        return line, max(total, 1)
    whole = best.line_at(seen, total) if seen else line
    if whole.fit_in(case.budget // 2) >= 1 or seen == 0 or not products.separable(problem, case.request):
        return whole, total
    one = best.line_at(seen, 1).at(1)
    each = (whole.at(1) - one) / max(total - 1, 1)
    rows = min(total, max(1, int((case.budget // 4 - one) / max(each, 1e-9))))
    return best.line_at(seen, rows), rows


def _tangents(case: Case, line: memory.Line) -> tuple[memory.Line, int]:
    """The line of `forward` and its tangents in flight: as many as it was tried with, or what the budget takes."""
    tried = min(forward.WIDTH, max(leaf.size for leaf in case.problem.leaves))
    if tried <= 1 or line.fit_in(case.budget // 2) >= 1:
        return line, max(tried, 1)
    width = max(1, min(tried, int(tried * (case.budget // 4) / max(line.at(1), 1))))
    return memory.Line(line.base * width / tried, line.slope * width / tried), width


def _reason(case: Case, field: Sequence[Tried], best: Tried) -> str:
    if case.request.method != "auto":
        return "asked for"
    others = [t for t in field if t.candidate.measured and t is not best]
    if best.candidate.method == "chain" and has_short_way(case):
        return "the model is a plain net, whose weights are multiplied in the cheapest order"
    if not others:
        untried = [t for t in field if not t.candidate.refused and t is not best]
        return "priced far below the others" if untried else "the only method that serves this work within reach"
    second = min(others, key=lambda t: t.candidate.seconds).candidate
    factor = second.seconds / best.candidate.seconds if best.candidate.seconds else 1.0
    return f"fastest on the first samples, {factor:.1f} times as fast as {second.method}"


def _notes(case: Case) -> tuple[str, ...]:
    about_operators = torchvision_operators.note(case.problem.module)
    notes = [about_operators] * bool(about_operators) + list(case.problem.notes)
    if case.known is None:
        notes.append("plain autograd cannot run this model backward, so methods were not compared with it")
    notes += case.standing.notes
    if case.alone:
        notes.append(f"{case.standing.why}: each sample is computed as a batch of one")
    return tuple(notes)


def _none_left(case: Case, field: Sequence[Tried]) -> MethodError:
    """What failed on what, and for an explicit method the one that would work."""
    asked = case.request.method
    if asked != "auto":
        auto = dataclasses.replace(case, request=case.request.model_copy(update={"method": "auto"}))
        able = [t.candidate for t in enter(auto) if t.line is not None]
        way_out = f"use method='auto', or {min(able, key=lambda c: c.seconds).method}, which can" if able else ""
        return MethodError("method", f"{asked} cannot do this work: {field[0].candidate.refused}", asked, way_out)
    reasons = "; ".join(f"{t.candidate.method}: {t.candidate.refused}" for t in field)
    return MethodError("model", f"no method can differentiate it ({reasons})", None, "")
