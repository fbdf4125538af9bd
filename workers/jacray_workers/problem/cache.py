"""What was prepared for a model, kept while the model lives: a second call costs only its arithmetic.

An entry is found again only when nothing that the preparation looked at has changed: the model's make-up (`makeup`),
the inputs' structure and shapes, and every field of the request. Values of parameters and of inputs are read afresh on
every call; where the model itself looks at its parameters' values, an entry also ends when one is written to.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.plan import Plan
from jacray_workers.problem.makeup import Makeup, version
from jacray_workers.problem.problem import Problem, as_module
from jacray_workers.problem.resolve import moved
from jacray_workers.request import Request
from jacray_workers.straight.reading import read

PER_MODEL = 32
# In a problem's memo: the model looks at values of its own parameters or buffers.
READS_OWN = "reads own"
# There too: it reads no values at all and keeps no state, so all batches of one shape meet the same operators.
SAME_STEPS = "same steps"
_entries: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Entry]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Key:
    """What an entry is found by, what the model has around it, and the input leaves that were flattened to make it."""

    parts: tuple[Any, ...]
    around: tuple[Any, ...]
    leaves: list[Tensor]


@dataclass(frozen=True)
class Entry:
    """What was prepared, and what must still be so.

    Attributes:
        around: what the model had around it; None where its own calls change that.
        versions: of the parameters, where the model looks at their values; else None.
    """

    problem: Problem
    plan: Plan
    around: tuple[Any, ...] | None
    versions: tuple[int, ...] | None


def key_of(model: Any, inputs: Any, request: Request, workers: tuple[int, bool]) -> Key | None:
    """Everything that a preparation depends on, or None where that cannot be told or kept."""
    # A bound method lives for one call, and what it does depends on what it is bound to.
    if not isinstance(model, nn.Module | FunctionType):
        return None
    try:
        made = Makeup(model)
    except RuntimeError:
        # A parameter that was never initialised has no shape; the model is refused where it is resolved.
        return None
    leaves, spec = pytree.tree_flatten(inputs)
    if not all(isinstance(leaf, Tensor) for leaf in leaves) or not leaves:
        return None
    held = {**request.__dict__, "weights": None, "vectors": None}
    asked = tuple([repr(value) if isinstance(value, list | dict) else value for value in held.values()])
    directions = (_shapes(request.weights), _shapes(request.vectors))
    shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
    # What was planned for a plain net holds for no other.
    plain = read(model) is not None
    parts = (made.core, plain, shapes, spec, asked, directions, workers, torch.get_num_threads())
    try:
        hash(parts)
    except TypeError:
        return None
    return Key(parts, made.around, leaves)


def recall(model: Any, key: Key | None) -> tuple[Problem, Plan, list[Tensor]] | None:
    """The problem around the model's present tensors, the plan, and the input leaves; None where nothing is kept."""
    entries = _entries.get(model) if key is not None else None
    if entries is None or key is None or key.parts not in entries:
        return None
    entries.move_to_end(key.parts)
    kept = entries[key.parts]
    if kept.around not in (None, key.around) or (kept.versions is not None and kept.versions != _versions(model)):
        return None
    problem, module = kept.problem, as_module(model)
    tensors = moved(module, problem.device, problem.cast)
    return problem.around(module, tensors), kept.plan, key.leaves


def remember(model: Any, key: Key | None, problem: Problem, plan: Plan) -> None:
    """Keep an entry for as long as the model lives; the least recently used goes first."""
    if key is None:
        return
    entries = _entries.setdefault(model, OrderedDict())
    around = key.around if Makeup(model).around == key.around else None
    versions = _versions(model) if problem.memo.get(READS_OWN) else None
    # Without the module and its tensors: an entry that held its own model would keep it alive for ever.
    entries[key.parts] = Entry(problem.around(_NOBODY, {}), plan, around, versions)
    while len(entries) > PER_MODEL:
        entries.popitem(last=False)


def forget() -> None:
    """Drop everything that is kept."""
    _entries.clear()


def _versions(model: Any) -> tuple[int, ...]:
    """How often each parameter was written to."""
    return tuple(version(p) for p in as_module(model).parameters())


_NOBODY = nn.Module()


def _shapes(directions: Any) -> Any:
    if isinstance(directions, Tensor):
        return tuple(directions.shape)
    if directions is None:
        return None
    return repr(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, directions))
