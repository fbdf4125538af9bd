"""What the kernels share: one sample as a function, and rows of the identity."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.errors import ModelError
from jacray_workers.problem.cache import SAME_STEPS
from jacray_workers.problem.problem import Leaf, Problem
from jacray_workers.unwanted import look

Sample = Callable[..., Tensor]
_SYMBOLIC = "torch.fx.experimental.symbolic_shapes"
# Steps of a sample of which everything is done.
WHOLE = 1 << 62


def per_sample(leaf: Leaf) -> bool:
    """Whether the leaf has a value of its own for each sample."""
    return leaf.side != "param"


def singly(tensors: Sequence[Tensor], axis: int = 0) -> Iterator[list[Tensor]]:
    """Each sample of a batch as a batch of one; `axis` is the samples'."""
    for i in range(tensors[0].shape[axis]):
        yield [tensor.narrow(axis, i, 1) for tensor in tensors]


def varied(problem: Problem, tangents: Sequence[Tensor]) -> bool:
    """Whether a parameter has tangents of its own for every sample: one expanded over B is the same for all."""
    return any(not per_sample(leaf) and v.stride(1) != 0 for leaf, v in zip(problem.leaves, tangents, strict=True))


def handed(problem: Problem, values: Sequence[Tensor]) -> list[Tensor]:
    """What the model is given in place of the leaves' values `values`, which require gradients and forbid writes.

    Copies of those that differ between samples, for it may write into its inputs; views where that was ruled out.
    """
    hand = _view if problem.memo.get(SAME_STEPS) else Tensor.clone
    return [hand(value) if per_sample(leaf) else value for leaf, value in zip(problem.leaves, values, strict=True)]


def _view(t: Tensor) -> Tensor:
    return t.view_as(t)


@contextlib.contextmanager
def unwritten(values: Sequence[Tensor]) -> Iterator[None]:
    """A pass of the model in which these must stay as they are; torch lets a model write where gradients are off.

    Raises:
        ModelError: the model wrote into its inputs, against all that was seen of it.
    """
    before = [value._version for value in values]
    yield
    if any(value._version != version for value, version in zip(values, before, strict=True)):
        rule = "must leave its inputs as they are, or write into them at the first sample already"
        raise ModelError("model", rule, None, "let it work on a clone of its inputs")


def leaf_dims(problem: Problem) -> tuple[int | None, ...]:
    """`in_dims` of the leaves' values for a `vmap` over samples."""
    return tuple(0 if per_sample(leaf) else None for leaf in problem.leaves)


def sample_function(problem: Problem, sample: Sequence[Tensor]) -> Sample:
    """The model at one sample as a function of the leaves' values: `(*leaf) ... -> (rows,)`.

    `sample` holds the input leaves of that sample without a batch axis; the model sees a batch of one.
    """
    batch = [leaf.unsqueeze(0) for leaf in sample]

    def function(*values: Tensor) -> Tensor:
        full = [v.unsqueeze(0) if per_sample(leaf) else v for leaf, v in zip(problem.leaves, values, strict=True)]
        return problem.forward(full, batch)[0]

    return function


def whole(values: Sequence[Tensor]) -> list[Tensor]:
    """The values, each in memory of its own: torch gives a tangent as much memory as its primal's storage has.

    For samples out of the middle of a large batch that would be the whole batch, for every tangent of every sample.
    """
    return [v.clone() if v.untyped_storage().nbytes() != v.nbytes else v for v in values]


def gradients(y: Tensor, values: Sequence[Any], cotangent: Tensor, *, keep: bool = False) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of `y` from a cotangent; None where nothing arrives.

    The first gradient of a process that is given a cotangent makes torch load sympy, for a second or more. Until
    somebody else has loaded it, the same numbers come from the sum of the products.
    """
    if _SYMBOLIC in sys.modules:
        return torch.autograd.grad(y, values, cotangent, retain_graph=keep, allow_unused=True)
    with torch.enable_grad():
        total = (y * cotangent).sum()
    return torch.autograd.grad(total, values, retain_graph=keep, allow_unused=True)


def basis(rows: range, total: int, like: Tensor) -> Tensor:
    """The rows `rows` of the identity of size `total`: `(len(rows), total)`."""
    eye = torch.zeros(len(rows), total, dtype=like.dtype, device=like.device)
    eye[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
    return eye


def spans(rows: range, width: int | None) -> Iterator[range]:
    """`rows` cut into ranges of at most `width`; work that is no longer wanted ends between two of them."""
    step = width or max(len(rows), 1)
    for start in range(rows.start, rows.stop, step):
        look()
        yield range(start, min(start + step, rows.stop))


class Targets(list[Tensor]):
    """Buffers to write blocks to, one per leaf.

    Attributes:
        steps: for each sample, how many steps of the method stand in the buffers: rows; columns of one leaf after the
            other for `forward`. A method goes on behind them, and counts them up as it goes; memory may run out.
        finite: the places of the buffers that were filled with numbers known to be finite, from bounds on what they
            were made of: reading a large result again would cost as much as writing it.
    """

    def __init__(self, buffers: Iterable[Tensor], steps: Iterable[int] = ()) -> None:
        super().__init__(buffers)
        self.steps = list(steps)
        self.finite: set[int] = set()


def begun(into: Sequence[Tensor] | None, sample: int = 0) -> int:
    """How many steps of a sample, or of all of them alike, are done already."""
    return into.steps[sample] if isinstance(into, Targets) and into.steps else 0


def reach(into: Sequence[Tensor] | None, steps: int, sample: int | None = None) -> None:
    """Note how many steps of a sample, or of all of them, are done now."""
    if isinstance(into, Targets):
        places = range(len(into.steps)) if sample is None else (sample,) if into.steps else ()
        for place in places:
            into.steps[place] = steps


def note_bound(into: Sequence[Tensor] | None, place: int, bound: float) -> None:
    """Tell a caller who wants to know that no number of a buffer is larger than `bound`; NaN where it may be NaN."""
    if isinstance(into, Targets) and bound < torch.finfo(into[place].dtype).max / 2:
        into.finite.add(place)


def blocks_for(problem: Problem, size: int, count: int, into: list[Tensor] | None) -> list[Tensor]:
    """Buffers `(size, count, *leaf)` to write blocks to: the caller's where given."""
    if into is not None:
        return into
    dtypes = [torch.promote_types(leaf.dtype, problem.dtype) for leaf in problem.leaves]
    return [
        pages.empty((size, count, *leaf.shape), dtype, problem.device)
        for leaf, dtype in zip(problem.leaves, dtypes, strict=True)
    ]
