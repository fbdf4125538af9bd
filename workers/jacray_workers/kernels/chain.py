"""`chain`: the model's Jacobian as a product of Jacobians, bracketed at least cost.

The model's calls are recorded once per shape of batch; where a single tensor carries everything, the recording is cut,
and a dynamic programme decides what is taken back, what forward, and what is multiplied. A bottleneck of width b then
costs b passes, and a wide head nothing but the product with its weight.

Source: U. Naumann, "Matrix-free Jacobian chaining", arXiv:2406.11862.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacray_workers.chain import probes
from jacray_workers.chain.chaining import ChainPlan, Known, Prepared, ready
from jacray_workers.chain.segments import WORKSPACE, Run, make
from jacray_workers.errors import MethodError
from jacray_workers.kernels import reverse
from jacray_workers.kernels.common import Targets, blocks_for, gradients
from jacray_workers.problem.problem import Problem
from jacray_workers.straight.kernel import Short, fill, short

# How far a first block may lie from plain autograd, relative to the size of the terms that are summed.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}
# Shapes of batch to remember per problem: the chunk, the last and shorter one, and a few trials.
SHAPES = 8
_WAY_OUT = "method='auto' finds one that can"


@dataclass
class _Memory:
    """What is remembered of one problem.

    Attributes:
        alive: the problem, while it is.
        band: the run that a caller is taking rows from in bands, with its batch.
    """

    alive: weakref.ref[Problem]
    band: tuple[list[tuple[weakref.ref[Tensor], int]], Prepared, Run] | None = None

    def let_go(self, _: object) -> None:
        """Forget the run in bands; called when its batch is gone."""
        self.band = None


_MEMORIES: dict[int, _Memory] = {}


def refuse(problem: Problem) -> str:
    """Why the method cannot serve the problem, or the empty string."""
    if any(leaf.side == "param" for leaf in problem.leaves):
        return "parameters enter a model in many places, so their Jacobian is no chain"
    if problem.random:
        return "random draws depend on a sample's place in the batch, and this method runs whole batches"
    dtypes = {problem.dtype, *(leaf.dtype for leaf in problem.leaves)}
    if len(dtypes) > 1 or problem.dtype not in AGREEMENT:
        got = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"it multiplies Jacobians in one precision, float32 or float64; got {got}"
    empty = not problem.rows or not all(leaf.size for leaf in problem.leaves)
    return "there is nothing to differentiate" if empty else ""


def price(problem: Problem, batch: Sequence[Tensor]) -> ChainPlan | Short | str:
    """The plan for this shape of batch, or why there is none. To be called inside `problem.session()`."""
    refused = refuse(problem)
    if refused:
        return refused
    plain = short(problem, batch)
    if plain is not None:
        return plain
    found = _ready(problem, problem.values(batch), batch)
    return found if isinstance(found, str) else found[0].plan


def cuts(problem: Problem, batch: Sequence[Tensor]) -> tuple[str, ...]:
    """Where the model is cut, and how the pieces are put together, as text."""
    plan = price(problem, batch)
    if isinstance(plan, Short):
        return (plan.text,)
    return () if isinstance(plan, str) else (*plan.cuts, plan.text)


def jacobian(
    problem: Problem, batch: Sequence[Tensor], rows: range | None = None, into: list[Tensor] | None = None
) -> list[Tensor]:
    """One block `(B, len(rows), *leaf)` per leaf.

    Raises:
        MethodError: the model cannot be traced, no cut pays, or the trace no longer tells what the model does.
    """
    refused = refuse(problem)
    if refused:
        raise _cannot(refused)
    size = batch[0].shape[0]
    wanted = range(problem.rows) if rows is None else rows
    plain = short(problem, batch)
    if plain is not None:
        return _by_the_short_way(problem, plain, batch, wanted, blocks_for(problem, size, len(wanted), into))
    try:
        prepared, run = _start(problem, batch, wanted)
    except MethodError:
        if not problem.compared:
            raise
        # With another mask the model may make other calls, in which no cut pays.
        return reverse.jacobian(problem, batch, wanted, into)
    run = replace(run, workspace=min(WORKSPACE, problem.workspace))
    blocks = blocks_for(problem, size, len(wanted), into)
    targets = Targets(
        block.view(size, len(wanted), leaf.size)
        if block.is_contiguous() and block.dtype == problem.dtype
        else run.env[prepared.cuttings.tape.output].new_empty(size, len(wanted), leaf.size)
        for block, leaf in zip(blocks, problem.leaves, strict=True)
    )
    make(run, prepared.plan.bracket, wanted, targets)
    if not prepared.trusted:
        _trust(problem, run.values(), targets, wanted, batch)
        prepared.trusted.add(True)
    for block, target in zip(blocks, targets, strict=True):
        if block.data_ptr() != target.data_ptr():
            block.copy_(target.view(block.shape))
    if isinstance(into, Targets):
        into.finite |= targets.finite
    return blocks


def _by_the_short_way(
    problem: Problem, plain: Short, batch: Sequence[Tensor], wanted: range, blocks: list[Tensor]
) -> list[Tensor]:
    """The block of a plain net; the first of its make is compared with plain autograd."""
    block = blocks[0]
    own = block.is_contiguous() and block.dtype == problem.dtype
    target = block if own else plain.x.new_empty(block.shape)
    targets = [target.view(*block.shape[:2], problem.leaves[0].size)]
    if isinstance(blocks, Targets):
        targets = Targets(targets)
    fill(plain, wanted, targets)
    trusted: set[Hashable] = problem.memo.setdefault("short", set())
    if plain.line.make not in trusted:
        _trust(problem, problem.values(batch), targets, wanted, batch)
        trusted.add(plain.line.make)
    if not own:
        block.copy_(target)
    if isinstance(blocks, Targets) and isinstance(targets, Targets):
        blocks.finite |= targets.finite
    return blocks


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """Refused: bracketing saves nothing where the Jacobian is not made."""
    del problem, batch, cotangents, per_sample_params
    raise _cannot("a product with vectors needs no chain")


def jvp(problem: Problem, batch: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Refused: bracketing saves nothing where the Jacobian is not made."""
    del problem, batch, tangents
    raise _cannot("a product with vectors needs no chain")


def _cannot(reason: str) -> MethodError:
    return MethodError("method", f"chain cannot do this work: {reason}", None, _WAY_OUT)


def _start(problem: Problem, batch: Sequence[Tensor], wanted: range) -> tuple[Prepared, Run]:
    """What was prepared for this shape, and this batch's run; taken up again where a caller goes on with more rows."""
    memory = _memory(problem)
    if memory.band is not None:
        held, prepared, run = memory.band
        same = [(id(ref()), version) for ref, version in held] == [(id(t), t._version) for t in batch]
        if not same or wanted.stop == problem.rows:
            memory.band = None
        if same:
            return prepared, run
    values = problem.values(batch)
    prepared, run = _fresh(problem, values, batch)
    if wanted.stop < problem.rows:
        run = Run(run.cuttings, run.env, run.samples, run.loops, {})
        memory.band = [(weakref.ref(t, memory.let_go), t._version) for t in batch], prepared, run
    return prepared, run


def _fresh(problem: Problem, values: list[Tensor], batch: Sequence[Tensor]) -> tuple[Prepared, Run]:
    """Replay the model, and compare with what it says itself now."""
    found = _ready(problem, values, batch)
    if isinstance(found, str):
        raise _cannot(found)
    prepared, now = found
    run = prepared.start(values, batch)
    if probes.differ(run.env[prepared.cuttings.tape.output].detach(), now):
        raise _cannot("its recorded calls give other outputs than the model")
    return prepared, run


def _ready(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Prepared, Tensor] | str:
    """What is known of this shape of batch, for as long as anything is kept of the problem."""
    known: Known = problem.memo.setdefault("chain", {})
    if len(known) > SHAPES:
        known.pop(next(iter(known)))
    return ready(problem, values, batch, known, _key(problem, values, batch))


def _memory(problem: Problem) -> _Memory:
    """What is remembered of this problem; forgotten with it."""
    number = id(problem)
    memory = _MEMORIES.get(number)
    if memory is None or memory.alive() is not problem:
        memory = _Memory(weakref.ref(problem, lambda _: _MEMORIES.pop(number, None)))
        _MEMORIES[number] = memory
    return memory


def _key(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Hashable:
    """A recording holds for the same leaves and outputs, and for tensors of the same shape, strides and type."""
    tensors = tuple((tuple(t.shape), t.stride(), t.dtype) for t in (*values, *batch))
    return problem.leaves, problem.outs, problem.point, tensors


def _trust(
    problem: Problem, values: Sequence[Tensor], blocks: list[Tensor], wanted: range, batch: Sequence[Tensor]
) -> None:
    """Compare the first block of a preparation with one plain backward pass for a random cotangent.

    Raises:
        MethodError: they disagree.
    """
    leaves = [value.detach().requires_grad_() for value in values]
    y = problem.forward(leaves, batch)[:, wanted.start : wanted.stop]
    random = torch.Generator().manual_seed(problem.seed)
    u = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y)
    found = gradients(y, leaves, u)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
    for block, grad in zip(blocks, grads, strict=True):
        mine, plain = torch.bmm(u[:, None], block)[:, 0], grad.reshape(len(block), -1)
        low, high = torch.aminmax(block)
        size = max(float(torch.maximum(high, -low)) * float(u.abs().max()), float(plain.abs().max()))
        gap = float((mine - plain).abs().max())
        if gap > AGREEMENT[problem.dtype] * size:
            raise _cannot(f"it disagrees with plain autograd by {gap / size:.1e} of the size of the result")
