"""What was prepared for a model, kept while the model lives: a second call costs only its arithmetic.

An entry is found again only when nothing that the preparation looked at has changed: the submodules and their plain
attributes, the identity, shape, type and place of every parameter and buffer, the inputs' structure and shapes, and
every field of the request. Values of parameters and of inputs are read afresh on every call.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.plan import Plan
from jacray_workers.problem.problem import Problem, as_module
from jacray_workers.problem.resolve import moved
from jacray_workers.problem.state import modules_of
from jacray_workers.request import Request
from jacray_workers.straight.reading import read

PER_MODEL = 32
_PLAIN = (bool, int, float, str, type(None))
_entries: weakref.WeakKeyDictionary[Any, OrderedDict[Any, tuple[Problem, Plan]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Key:
    """What an entry is found by, and the input leaves that were flattened to make it."""

    parts: tuple[Any, ...]
    leaves: list[Tensor] = field(compare=False, hash=False)


def key_of(model: Any, inputs: Any, request: Request, workers: tuple[int, bool]) -> Key | None:
    """Everything that a preparation depends on, or None where that cannot be told or kept."""
    try:
        function = _function_state(model)
    except RuntimeError:
        # A parameter that was never initialised has no shape; the model is refused where it is resolved.
        return None
    leaves, spec = pytree.tree_flatten(inputs)
    if function is None or not all(isinstance(leaf, Tensor) for leaf in leaves) or not leaves:
        return None
    asked = tuple(
        repr(value) if isinstance(value, list | dict) else value
        for name, value in request.__dict__.items()
        if name not in ("weights", "vectors")
    )
    directions = (_shapes(request.weights), _shapes(request.vectors))
    shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
    # What was planned for a plain net holds for no other.
    plain = read(model) is not None
    parts = (function, plain, shapes, spec, asked, directions, workers, torch.get_num_threads())
    try:
        hash(parts)
    except TypeError:
        return None
    return Key(parts, leaves)


def recall(model: Any, key: Key | None) -> tuple[Problem, Plan, list[Tensor]] | None:
    """The problem around the model's present tensors, the plan, and the input leaves; None where nothing is kept."""
    entries = _entries.get(model) if key is not None else None
    if entries is None or key is None or key.parts not in entries:
        return None
    entries.move_to_end(key.parts)
    problem, plan = entries[key.parts]
    module = as_module(model)
    tensors = moved(module, problem.device, problem.cast)
    return replace(problem, module=module, tensors=tensors), plan, key.leaves


def remember(model: Any, key: Key | None, problem: Problem, plan: Plan) -> None:
    """Keep an entry for as long as the model lives; the least recently used goes first."""
    if key is None:
        return
    entries = _entries.setdefault(model, OrderedDict())
    # Without the module and its tensors: an entry that held its own model would keep it alive for ever.
    entries[key.parts] = replace(problem, module=_NOBODY, tensors={}), plan
    while len(entries) > PER_MODEL:
        entries.popitem(last=False)


def forget() -> None:
    """Drop everything that is kept."""
    _entries.clear()


_NOBODY = nn.Module()


def _function_state(model: Any) -> tuple[Any, ...] | None:
    """The make-up of a module or a plain function without the values of tensors; None where it cannot be seen."""
    if isinstance(model, nn.Module):
        return _module_state(model)
    # A bound method lives for one call, and what it does depends on what it is bound to.
    if not isinstance(model, FunctionType):
        return None
    code, named = model.__code__, model.__kwdefaults__ or {}
    try:
        cells = [cell.cell_contents for cell in (model.__closure__ or ())]
    except ValueError:
        # A cell that is not filled yet.
        return None
    held = tuple(map(_identity, (*cells, *(model.__defaults__ or ()), *named, *named.values())))
    # A function that reads a global can change behind our back.
    read = tuple((name, _identity(model.__globals__.get(name))) for name in code.co_names)
    return (code, held, read)


def _module_state(module: nn.Module) -> tuple[Any, ...]:
    return tuple(_part_state(part) for part in modules_of(module))


def _part_state(m: nn.Module) -> tuple[Any, ...]:
    """One submodule without those below it: what it is, its plain attributes, and its tensors but for their values."""
    # `training` is set by the request, whatever the caller's module says.
    plain = [(k, v) for k, v in m.__dict__.items() if type(v) in _PLAIN and k != "training"]
    tensors = [
        (name, id(t), t.shape, t.dtype, t.device)
        for table in (m._parameters, m._buffers)
        for name, t in table.items()
        if t is not None
    ]
    names = (*m._modules, *map(id, m._modules.values()))
    return type(m), len(m._forward_hooks), len(m._forward_pre_hooks), names, *plain, *tensors


def _identity(value: Any) -> Any:
    """A number or a text by its value, a module by its make-up, anything else by its identity."""
    if type(value) in _PLAIN:
        return value
    return _module_state(value) if isinstance(value, nn.Module) else id(value)


def _shapes(directions: Any) -> Any:
    if isinstance(directions, Tensor):
        return tuple(directions.shape)
    if directions is None:
        return None
    return repr(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, directions))
