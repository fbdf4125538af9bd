"""`backward_loop`: plain autograd, one backward per output row (one for all rows where passes are tiny).

For inputs and hidden points the whole batch goes forward at once and row r's backward starts from the sum over
samples, which is right only where samples are independent: the engine probes that first, and otherwise calls with a
batch of one. Parameters take one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jacray_workers.errors import MethodError
from jacray_workers.kernels.common import (
    WHOLE,
    basis,
    begun,
    blocks_for,
    gradients,
    handed,
    per_sample,
    reach,
    singly,
    unwritten,
    varied,
)
from jacray_workers.problem.problem import Problem
from jacray_workers.sharing import math_attention
from jacray_workers.unwanted import look

# Numbers in flight up to which a pass is all overhead: folding the rows into the batch then beats one pass per row.
FOLDED = 1 << 17

# One row goes at a time, whatever the width.
CHUNKS_ITSELF = True

T = TypeVar("T")
# `y`, values, cotangent, whether the graph is still needed -> one gradient per value.
Pull = Callable[[Tensor, Sequence[Tensor], Tensor | None, bool], list[Tensor]]


def refuse(problem: Problem) -> str:
    """No shape alone defeats it."""
    del problem
    return ""


def jacobian(
    problem: Problem,
    batch: Sequence[Tensor],
    rows: range | None = None,
    into: list[Tensor] | None = None,
    width: int | None = None,
) -> list[Tensor]:
    """One block `(B, len(rows), *leaf)` per leaf. `width` has no meaning here: one row goes at a time."""
    del width
    rows = range(problem.rows) if rows is None else rows
    blocks = blocks_for(problem, batch[0].shape[0], len(rows), into)
    if all(per_sample(leaf) for leaf in problem.leaves):
        done = begun(into)
        _loop(problem, batch, rows[done:], [block[:, done:] for block in blocks], lambda n: reach(into, done + n))
        return blocks
    for i in range(batch[0].shape[0]):
        done = begun(into, i)
        if done < WHOLE:
            alone, own = [leaf[i : i + 1] for leaf in batch], [block[i : i + 1, done:] for block in blocks]
            _loop(problem, alone, rows[done:], own, lambda n, i=i, done=done: reach(into, done + n, i))  # type: ignore[misc]
            reach(into, WHOLE, i)
    return blocks


def _loop(
    problem: Problem,
    batch: Sequence[Tensor],
    rows: range,
    blocks: Sequence[Tensor],
    note: Callable[[int], None],
) -> None:
    """Write these rows, and note after each how many are done."""
    if _launch_bound(problem, batch, len(rows)):
        _fold(problem, batch, rows, blocks)
        return

    def pull_rows(values: Sequence[Tensor], y: Tensor, pull: Pull) -> None:
        for place, row in enumerate(rows):
            # An only row needs no taking out, whose derivative is written into zeros.
            grads = pull(y.sum() if y.shape[1] == 1 else y[:, row].sum(), values, None, row != rows[-1])
            for block, leaf, grad in zip(blocks, problem.leaves, grads, strict=True):
                block[:, place] = grad if per_sample(leaf) else grad.unsqueeze(0)
            note(place + 1)

    on_graph(problem, batch, pull_rows)


def _launch_bound(problem: Problem, batch: Sequence[Tensor], rows: int) -> bool:
    """Whether the backward passes are so small that calling them costs more than their arithmetic."""
    widest = max(leaf.size for leaf in problem.leaves)
    cheap = rows * batch[0].shape[0] * (widest + problem.rows) <= FOLDED and not problem.random
    # Copies make another batch than the one that was compared with its samples. A batch of one may mean that the model
    # does not take several: copies of one sample would be several too.
    several = batch[0].shape[0] > 1
    return rows > 1 and several and cheap and not problem.compared and all(per_sample(leaf) for leaf in problem.leaves)


def _fold(problem: Problem, batch: Sequence[Tensor], rows: range, blocks: Sequence[Tensor]) -> None:
    """All rows in one backward: the batch is repeated once per row, and each copy pulls its own row back."""
    size, count = batch[0].shape[0], len(rows)

    def pull_copies(values: Sequence[Tensor], y: Tensor, pull: Pull) -> None:
        cotangent = basis(rows, problem.rows, y).repeat(size, 1)
        for block, grad in zip(blocks, pull(y, values, cotangent, False), strict=True):
            block.copy_(grad.reshape(block.shape))

    on_graph(problem, [leaf.repeat_interleave(count, dim=0) for leaf in batch], pull_copies)


def on_graph(problem: Problem, batch: Sequence[Tensor], use: Callable[[Sequence[Tensor], Tensor, Pull], T]) -> T:
    """What `use` makes of fresh leaves that require gradients, of the outputs as a function of them, and of `pull`.

    A checkpoint runs a part of the model again in the backward pass: the parameters' values must then still be in
    place, and the old kind of checkpoint allows nothing but a whole backward.
    """
    values = [value.detach().requires_grad_() for value in problem.values(batch)]
    try:
        y = _outputs(problem, values, batch)
        if not _reentrant(problem, y):
            return use(values, y, pull)
    except MethodError as error:
        if "checkpoint" not in str(error):
            raise
    swapped = {leaf.name: v for leaf, v in zip(problem.leaves, values, strict=True) if leaf.side == "param"}
    held = {f"module.{name}": tensor for name, tensor in {**problem.tensors, **swapped}.items()}

    def work() -> T:
        return use(values, _outputs(problem, values, batch), _pull_whole)

    found: T = torch.func.functional_call(_Holder(problem.module), held, (work,))
    return found


def _reentrant(problem: Problem, y: Tensor) -> bool:
    """Whether a checkpoint of the old kind stands in the graph: parameters within it are no part of that graph."""
    if all(per_sample(leaf) for leaf in problem.leaves):
        return False
    if "reentrant" not in problem.memo:
        seen: set[Any] = set()
        ahead = [y.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in seen:
                seen.add(node)
                ahead += [fn for fn, _ in node.next_functions]
        problem.memo["reentrant"] = any(node.name() == "CheckpointFunctionBackward" for node in seen)
    return bool(problem.memo["reentrant"])


class _Holder(nn.Module):
    """Does some work while other tensors are in the place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Any]) -> Any:
        """Do the work."""
        return work()


def _outputs(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
    """The outputs at these leaves."""
    with unwritten([value for leaf, value in zip(problem.leaves, values, strict=True) if per_sample(leaf)]):
        return _run(problem, handed(problem, values), batch)


def _run(problem: Problem, given: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
    if all(per_sample(leaf) for leaf in problem.leaves):
        return problem.forward(given, batch)
    # The old kind of checkpoint drops the parameters within it where no input requires a gradient.
    awake = [leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for leaf in batch]
    try:
        return problem.forward(given, awake)
    except RuntimeError:
        # Some models turn their inputs into numpy arrays, which asks for inputs that require none.
        return problem.forward(given, batch)


def pull(y: Tensor, values: Sequence[Tensor], cotangent: Tensor | None, keep: bool) -> list[Tensor]:
    """The gradient of `y` wrt every value, zeros where it does not depend on one.

    Raises:
        MethodError: the model cuts its outputs off from automatic differentiation.
    """
    look()
    if not y.requires_grad:
        return [torch.zeros_like(value) for value in values]
    try:
        grads: Sequence[Tensor | None]
        if cotangent is None:
            grads = torch.autograd.grad(y, values, retain_graph=keep, allow_unused=True)
        else:
            grads = gradients(y, values, cotangent, keep=keep)
    except RuntimeError as error:
        raise MethodError("method", f"backward failed: {error}", "backward_loop") from error
    return [torch.zeros_like(value) if grad is None else grad for value, grad in zip(values, grads, strict=True)]


def _pull_whole(y: Tensor, values: Sequence[Tensor], cotangent: Tensor | None, keep: bool) -> list[Tensor]:
    """The same by a backward to every leaf of the graph."""
    look()
    if not y.requires_grad:
        return [torch.zeros_like(value) for value in values]
    for value in values:
        value.grad = None
    try:
        torch.autograd.backward(y, cotangent, retain_graph=keep)
    except RuntimeError as error:
        raise MethodError("method", f"backward failed: {error}", "backward_loop") from error
    return [torch.zeros_like(value) if value.grad is None else value.grad for value in values]


def vjp(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor, per_sample_params: bool = True) -> list[Tensor]:
    """One backward per cotangent `(B, rows)`; one per sample too where parameters must stay per sample."""
    if per_sample_params and not all(per_sample(leaf) for leaf in problem.leaves):
        return _vjp_by_sample(problem, batch, cotangents)
    last = len(cotangents) - 1

    def pull_each(values: Sequence[Tensor], y: Tensor, pull: Pull) -> list[list[Tensor]]:
        return [pull(y, values, k.to(y.dtype), i != last) for i, k in enumerate(cotangents)]

    found = on_graph(problem, batch, pull_each)
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _vjp_by_sample(problem: Problem, batch: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    found = []
    for i, sample in enumerate(singly(batch)):
        parts = vjp(problem, sample, cotangents[:, i : i + 1], per_sample_params=False)
        found.append([p if per_sample(leaf) else p.unsqueeze(1) for p, leaf in zip(parts, problem.leaves, strict=True)])
    return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]


def jvp(problem: Problem, batch: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """The push-forward as the derivative of the pull-back wrt its cotangent: two backwards per tangent.

    A parameter's tangents of their own for every sample take one sample at a time; one expanded over B does not.

    Source: J. Townsend, "A new trick for calculating Jacobian vector products" (2017).
    """
    if varied(problem, tangents) and batch[0].shape[0] > 1:
        pairs = zip(singly(batch), singly(tangents, 1), strict=True)
        return torch.cat([jvp(problem, sample, own) for sample, own in pairs], dim=1)
    with math_attention():
        return on_graph(problem, batch, lambda values, y, _: _push(problem, values, y, tangents))


def _push(problem: Problem, values: Sequence[Tensor], y: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    if not y.requires_grad:
        return y.new_zeros(tangents[0].shape[0], *y.shape)
    probe = torch.zeros_like(y, requires_grad=True)
    try:
        grads = torch.autograd.grad(y, values, probe, create_graph=True, allow_unused=True, materialize_grads=True)
        pairs = [(i, g) for i, g in enumerate(grads) if g.requires_grad]
        pushed = [_push_one(problem, pairs, probe, [t[k] for t in tangents]) for k in range(tangents[0].shape[0])]
    except RuntimeError as error:
        raise MethodError("method", f"backward through the backward failed: {error}", "backward_loop") from error
    return torch.stack(pushed).detach()


def _push_one(
    problem: Problem, pairs: Sequence[tuple[int, Tensor]], probe: Tensor, tangent: Sequence[Tensor]
) -> Tensor:
    if not pairs:
        return torch.zeros_like(probe)
    heads = [g for _, g in pairs]
    vs = [tangent[i] if per_sample(problem.leaves[i]) else tangent[i][0] for i, _ in pairs]
    cast = [v.to(h.dtype) for v, h in zip(vs, heads, strict=True)]
    return torch.autograd.grad(heads, probe, cast, retain_graph=True)[0]
