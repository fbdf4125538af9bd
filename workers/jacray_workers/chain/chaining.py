"""From a problem to a bracketing that was tried: record, cut, price, and run each piece once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jacray_workers.chain import bracket as brackets
from jacray_workers.chain import probes
from jacray_workers.chain.bracket import Bracket
from jacray_workers.chain.cuts import BATCH, Cut, Cuttings, Layout, bottlenecks, cuttings, layouts, operations
from jacray_workers.chain.segments import WORKSPACE, Run, adjoint_gap, passes, vector_bytes, vmap_gap
from jacray_workers.chain.sink import sink
from jacray_workers.chain.tape import Tape, blank, same_calls
from jacray_workers.chain.trace import Untraceable, record
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.problem.problem import Problem
from jacray_workers.sharing import math_attention

# The least factor by which a bracketing must beat the better pure mode, and the least number of operations it must
# save for a batch of usual size: below these the calls themselves cost what the arithmetic saves.
GAIN = 1.25
SAVED = 2e7
# How far two ways to take the same vectors through a segment may lie apart, relative to their size.
TRIALS = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True)
class ChainPlan:
    """How `chain` does a problem.

    Attributes:
        cuts: the cuts used, as text.
        bracket: the bracketing.
        operations: of the bracketing, for the batch.
        pure_operations: of the better one of plain reverse and plain forward mode.
        peak_bytes: what it holds at the most beside the result.
        launches: calls of an operator.
        text: the bracketing as one sentence.
    """

    cuts: tuple[str, ...]
    bracket: Bracket
    operations: float
    pure_operations: float
    peak_bytes: int
    launches: int
    text: str


@dataclass
class Prepared:
    """What is kept per problem and shape of batch.

    Attributes:
        cuttings: the cut tape.
        plan: the plan.
        samples: the size of the batch.
        keep: the values that a replay must not let go.
        loops: the segments whose backward does not run under `vmap`.
        trusted: holds something once a block has been compared with plain autograd; shared by all that is made of
            one preparation.
    """

    cuttings: Cuttings
    plan: ChainPlan
    samples: int
    keep: frozenset[int]
    loops: frozenset[tuple[int, int]]
    trusted: set[bool] = field(default_factory=set)

    def start(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Run:
        """Run the model on a batch."""
        return _start(self.cuttings, self.keep, self.samples, self.loops, values, batch)


def _start(
    found: Cuttings,
    keep: frozenset[int],
    samples: int,
    loops: frozenset[tuple[int, int]],
    values: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> Run:
    leaves = [value.detach().requires_grad_() for value in values]
    # Tensors of our own, so that a run that is kept does not keep the caller's batch alive.
    own = [tensor.detach() for tensor in batch]
    return Run(found, probes.replay(found.tape, leaves, own, keep), samples, loops)


@dataclass
class Kept:
    """What is kept of one preparation, and outlives the model: no tensor of its.

    Attributes:
        raw: the tape as it was recorded.
        prepared: what was made of it.
    """

    raw: Tape
    prepared: Prepared


Known = dict[Hashable, Kept | str]


def ready(
    problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor], known: Known, key: Hashable
) -> tuple[Prepared, Tensor] | str:
    """The preparation for this batch, and what the model itself says of it; or why `chain` is refused.

    The model runs, and its calls are recorded, every time: only where they are the ones that were prepared for, to the
    last plain argument, is the preparation used again, with the tensors that the model uses now.
    """
    kept = known.get(key)
    if isinstance(kept, str):
        return kept
    try:
        tape, now = record(problem, values, batch)
        if kept is None or not same_calls(kept.raw, tape):
            prepared = _prepare(problem, tape, values, batch)
            cut = prepared.cuttings
            kept = Kept(blank(tape), replace(prepared, cuttings=replace(cut, tape=blank(cut.tape))))
            known[key] = kept
    except Exception as error:
        if out_of_memory(error):
            raise
        known[key] = refused = _why(error)
        return refused
    cut = kept.prepared.cuttings
    return replace(kept.prepared, cuttings=replace(cut, tape=replace(cut.tape, constants=tape.constants))), now


def _why(error: Exception) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    return f"its calls cannot be recorded ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]})"


def _prepare(problem: Problem, tape: Tape, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Prepared:
    samples = batch[0].shape[0]
    tape, env, costs = _priced(tape, values, batch, samples)
    places = [v for at in bottlenecks(tape) for v in tape.nodes[at].makes if v in tape.dep]
    places = [v for v in places if env[v].dtype == problem.dtype and layouts(tuple(env[v].shape), samples)]
    ends = Cut(-1, 0, "the input", tuple(Layout(tuple(v.shape), 1, samples, v.numel() // samples) for v in values))
    guessed = {v: layouts(tuple(env[v].shape), samples)[0] for v in places}
    _must_pay(cuttings(tape, env, ends, guessed, costs))
    probes.validate(problem, tape, values, batch)
    located = probes.locate(tape, env, values, batch, places)
    found = cuttings(tape, env, ends, located, costs)
    return _tried(found, samples, values, batch)


def _priced(
    tape: Tape, values: Sequence[Tensor], batch: Sequence[Tensor], samples: int
) -> tuple[Tape, list[Tensor], list[float]]:
    """The tape with choices of positions moved to the front, all its values, and the operations of its calls."""
    env = tape.start(values, batch)
    with math_attention():
        costs = operations(tape, env, samples)
    moved = sink(tape, [tuple(t.shape) if isinstance(t, Tensor) else None for t in env])
    if moved.count == tape.count:
        return tape, env, costs
    return _priced(moved, values, batch, samples)


def _must_pay(found: Cuttings) -> Bracket:
    """The best bracketing.

    Raises:
        Untraceable: it is hardly better than a pure mode.
    """
    best = brackets.solve(found.chain)
    plain = brackets.pure(found.chain)
    if plain < GAIN * best.cost or (plain - best.cost) * BATCH < SAVED:
        raise Untraceable("no cut pays")
    return best


def _tried(found: Cuttings, samples: int, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Prepared:
    """Run every segment once with a few vectors: where it cannot go forward the chain is bracketed anew without."""
    everything = frozenset(range(found.tape.count))
    run = _start(found, everything, samples, frozenset(), values, batch)
    while True:
        best = _must_pay(found)
        loops, blocked = _obstacles(run, best)
        if blocked is None:
            break
        forward = tuple(f and not blocked[0] <= at < blocked[1] for at, f in enumerate(found.chain.forward))
        found = replace(found, chain=replace(found.chain, forward=forward))
        run = replace(run, cuttings=found)
    return Prepared(found, _plan(found, best, samples, loops), samples, _kept(found, best), loops)


def _obstacles(run: Run, best: Bracket) -> tuple[frozenset[tuple[int, int]], tuple[int, int] | None]:
    """The segments whose backward must go one vector at a time, and the first that cannot go forward."""
    loops: set[tuple[int, int]] = set()
    for each in passes(run.cuttings, best):
        if _holds(adjoint_gap if each.forward else vmap_gap, run, each.through):
            continue
        if each.forward:
            return frozenset(loops), each.through
        loops.add(each.through)
    return frozenset(loops), None


def _holds(check: Callable[[Run, tuple[int, int]], tuple[float, float]], run: Run, through: tuple[int, int]) -> bool:
    """Whether a check of a segment runs, and finds no more than rounding."""
    try:
        with warnings.catch_warnings(), math_attention():
            # torch warns where `vmap` has no rule for a backward and goes one vector at a time by itself.
            warnings.filterwarnings("error", message=".*performance drop.*")
            gap, size = check(run, through)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    return gap <= TRIALS[run.env[run.cuttings.tape.output].dtype] * size


def _kept(found: Cuttings, best: Bracket) -> frozenset[int]:
    """The values that carrying out the bracketing needs after the replay."""
    kept = {cut.value for cut in found.cuts} | {weight.value for weight in found.weights if weight is not None}
    kept.update(found.tape.leaves)
    for each in passes(found, best):
        if each.forward:
            needs = (value for node in found.between(*each.through) for value in node.needs)
            kept.update(value for value in needs if value not in found.tape.dep)
    return frozenset(kept)


def _plan(found: Cuttings, best: Bracket, samples: int, loops: frozenset[tuple[int, int]]) -> ChainPlan:
    launches, workspace = _passing(found, best, samples, loops)
    widths = found.chain.widths
    parts = [part for part in best.walk() if part is not best and part.kind != "known"]
    inner = sum(widths[part.start] * widths[part.stop] for part in parts)
    return ChainPlan(
        cuts=_bottlenecks(found, best),
        bracket=best,
        operations=best.cost * samples,
        pure_operations=brackets.pure(found.chain) * samples,
        peak_bytes=workspace + found.itemsize * samples * (inner + found.activations),
        launches=launches,
        text=describe(found, best),
    )


def _passing(found: Cuttings, best: Bracket, samples: int, loops: frozenset[tuple[int, int]]) -> tuple[int, int]:
    """Calls of operators, and bytes for the vectors in flight."""
    launches, workspace = len(found.tape.nodes), 0
    for each in passes(found, best):
        one = vector_bytes(found, *each.through, samples)
        chunks = each.vectors if each.through in loops else max(1, -(-each.vectors * one // WORKSPACE))
        launches += 2 * len(found.between(*each.through)) * chunks
        workspace = max(workspace, min(each.vectors * one, max(WORKSPACE, one)))
    return launches, workspace


def _bottlenecks(found: Cuttings, best: Bracket) -> tuple[str, ...]:
    """The cuts at which two Jacobians are multiplied that are narrower than what they connect, as text."""
    widths = found.chain.widths
    products = [part for part in best.walk() if part.kind == "product"]
    used = {part.at for part in products if widths[part.at] < min(widths[part.start], widths[part.stop])}
    return tuple(f"after {found.cuts[at].name} ({widths[at]:,} wide)" for at in sorted(used))


def describe(found: Cuttings, best: Bracket) -> str:
    """The bracketing as a sentence: what is taken which way, and what is multiplied."""
    names, widths = [cut.name for cut in found.cuts], found.chain.widths
    span = f"{names[best.start]} to {names[best.stop]}"
    modes = _modes(best)
    if not modes:
        return f"{span} read off the weight"
    if modes == {"reverse"}:
        return f"{span} in reverse ({widths[best.stop]:,} rows)"
    if modes == {"forward"}:
        return f"{span} forward ({widths[best.start]:,} columns)"
    start, stop = best.through
    through = f"{names[start]} to {names[stop]}"
    if best.kind == "pull":
        return f"{describe(found, best.parts[0])}; its {widths[best.stop]:,} rows back through {through}"
    if best.kind == "push":
        return f"{describe(found, best.parts[0])}; its {widths[best.start]:,} columns on through {through}"
    left, right = best.parts
    if left.kind == "known":
        return f"{describe(found, right)}; times the weight of {names[best.stop]}"
    return f"{describe(found, right)}; {describe(found, left)}; their product"


def _modes(best: Bracket) -> set[str]:
    """The directions in which vectors go; a product with a weight takes rows back, or columns on, like any pass."""
    if best.kind in ("reverse", "pull"):
        return {"reverse"}.union(*map(_modes, best.parts))
    if best.kind in ("forward", "push"):
        return {"forward"}.union(*map(_modes, best.parts))
    if best.kind == "known":
        return set()
    left, right = best.parts
    if right.kind == "known":
        return _modes(left) | {"reverse"}
    return _modes(right) | ({"forward"} if left.kind == "known" else {"product"})
