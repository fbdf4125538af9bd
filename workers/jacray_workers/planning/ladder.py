"""Whether a model may be run on whole batches, and if not, why: the question before any method is tried.

jacray's Jacobian of a sample is the model's at a batch of one. Methods that run many samples in one call are admitted
only where that gives the same; where it does not, the samples go one at a time, or under `vmap`, which shows the model
one sample as well. A model that couples its samples has no per-sample answer and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError
from jacray_workers.problem.problem import Problem
from jacray_workers.trust import independence

# What turns a tensor's value into a Python value, on which the path through a model may then depend.
_READS = frozenset(("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"))


@dataclass(frozen=True)
class Standing:
    """How a model's samples may be run.

    Attributes:
        batched: whole batches give every sample what it gives alone.
        why: why not, or the empty string.
        notes: what a reader of the plan should know besides.
    """

    batched: bool
    why: str = ""
    notes: tuple[str, ...] = ()


def stand(problem: Problem, batch: Sequence[Tensor]) -> Standing:
    """Probe the model; called inside `problem.session()`.

    Raises:
        CoupledSamplesError: one sample's output depends on another sample; the module is named where it is known.
    """
    found = independence.probe(problem, batch)
    if not problem.training and reads_values(problem, batch):
        why = "the model reads values of its data (a branch, .item()), so a batch may take another path than a sample"
        return Standing(False, why, found.notes)
    independence.require(found)
    if problem.random:
        return Standing(
            False, "the model draws random numbers, which differ between a batch and its samples", found.notes
        )
    return Standing(found.same_alone and found.batchable, found.why, found.notes)


def reads_values(problem: Problem, batch: Sequence[Tensor]) -> bool:
    """Whether the model turns the value of a tensor that depends on its inputs into a Python value."""
    values = problem.values(batch)
    reads = _Reads([*batch, *values])
    with torch.no_grad(), reads:
        try:
            problem.forward(values, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, ModelError):
            return reads.seen
    return reads.seen


class _Reads(TorchFunctionMode):
    """Notices calls that read a value derived from the data it is given."""

    def __init__(self, data: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen = False
        # The tensors themselves are kept, for an id means nothing once its tensor is gone.
        self._data = {id(tensor): tensor for tensor in data}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and id(leaf) in self._data for leaf in given):
            self.seen = self.seen or getattr(func, "__name__", "") in _READS
            self._data.update((id(leaf), leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result
