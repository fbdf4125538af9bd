"""What a model is made of, as a value that changes whenever something changes that a plan may rest on.

Looked at are the submodules, their attributes, and what those hold: containers, plain objects such as a configuration,
functions and what they are closed over, attributes of the model's classes and the globals that their methods read. Of
parameters it is all but the values, for these change with every step of a training; of buffers the counter of writes
too, but for running statistics.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jacray_workers.problem.state import modules_of

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
# What every module has: the tables are looked at as such, and the mode is set by the request.
_BASE = frozenset(vars(nn.Module()))
_SEQUENCES = frozenset((list, tuple, deque))
_TABLES = frozenset((dict, OrderedDict))
_OPAQUE = (type, ModuleType, BuiltinFunctionType, torch.Generator)
# Running statistics are used one number per channel, whatever they are.
_NORMS = nn.modules.batchnorm._NormBase
# How deep containers and objects within each other are looked into, how long they may be, and how many in all; what is
# beyond counts by its identity.
DEPTH, ITEMS, MOST = 4, 256, 4000
# Classes of these packages do not change between two calls.
_LIBRARIES = frozenset(("torch", "torchvision", "transformers", "timm", "builtins"))


class Makeup:
    """Reads one model. What is met a second time counts by its identity, so cycles end.

    Attributes:
        core: the submodules, their plain attributes and their tensors; the same after a call as before it.
        around: everything else, of which some models change a part whenever they are called.
    """

    def __init__(self, model: nn.Module | FunctionType) -> None:
        self._seen: set[int] = set()
        self._left = MOST
        core, around = list[Any](), list[Any]()
        if isinstance(model, nn.Module):
            self._module(model, core, around)
        else:
            core.append(model.__code__)
            for value in (*_held(model), *self._read_by(model)):
                self._take(value, core, around)
        self.core, self.around = tuple(core), tuple(around)

    def _module(self, module: nn.Module, core: list[Any], around: list[Any]) -> None:
        parts = modules_of(module)
        self._seen.update(map(id, parts))
        for part in parts:
            self._part(part, core, around)

    def _part(self, m: nn.Module, core: list[Any], around: list[Any]) -> None:
        """One submodule without those below it."""
        core += (type(m), *m._forward_hooks, *m._forward_pre_hooks, None, *m._backward_hooks, *m._backward_pre_hooks)
        # The tables of scripted modules are no dicts.
        for name, child in m._modules.items():
            core += (name, id(child))
        for name, t in m._parameters.items():
            if t is not None:
                core += (name, id(t), t.shape, t.dtype, t.device, t.requires_grad)
        for name, buffer in m._buffers.items():
            if buffer is not None:
                core += (name, id(buffer), buffer.shape, buffer.dtype, buffer.device)
                around.append(0 if isinstance(m, _NORMS) else version(buffer))
        for name, value in m.__dict__.items():
            if name not in _BASE:
                core.append(name)
                self._take(value, core, around)
        if id(type(m)) not in self._seen:
            self._seen.add(id(type(m)))
            self._class(type(m), around)

    def _take(self, value: Any, core: list[Any], around: list[Any]) -> None:
        if type(value) in PLAIN:
            core.append(value)
        elif isinstance(value, nn.Module) and id(value) not in self._seen:
            self._module(value, core, around)
        else:
            around.append(self._look(value, DEPTH))

    def _class(self, kind: type, around: list[Any]) -> None:
        """The plain attributes of a class of the user's, and the globals that its methods read."""
        for cls, methods in _own_classes(kind):
            for name, value in vars(cls).items():
                if not name.startswith("__") and not callable(value):
                    around += (name, self._look(value, DEPTH))
            for method in methods:
                around += (self._look(value, DEPTH) for value in self._read_by(method))

    def _read_by(self, function: FunctionType) -> Iterator[Any]:
        """What a function reads by name can change behind our back."""
        known = function.__globals__
        for name in function.__code__.co_names:
            value = known.get(name)
            if value is not None and not isinstance(value, _OPAQUE):
                yield value

    def _function(self, function: FunctionType, depth: int) -> tuple[Any, ...]:
        return (function.__code__, *(self._look(value, depth) for value in _held(function)))

    def _look(self, value: Any, depth: int) -> Any:
        """Numbers and texts by value, tensors by all but their numbers, containers and objects by what they hold."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, Tensor):
            return id(value), value.shape, value.dtype, value.device, version(value)
        if depth == 0 or self._left <= 0 or isinstance(value, _OPAQUE) or id(value) in self._seen:
            return id(value)
        self._seen.add(id(value))
        self._left -= 1
        if kind in _SEQUENCES or kind in _TABLES or kind in (set, frozenset):
            return self._container(value, kind, depth)
        return self._object(value, kind, depth)

    def _container(self, value: Any, kind: type, depth: int) -> Any:
        if len(value) > ITEMS:
            return id(value), len(value)
        if kind in _TABLES:
            return (kind, *value, *self._each(value.values(), depth)) if _plain(value) else self._pairs(value, depth)
        each = self._each(value, depth)
        return (kind, frozenset(each)) if kind in (set, frozenset) else (kind, *each)

    def _pairs(self, value: dict[Any, Any], depth: int) -> Any:
        return (type(value), *self._each(value, depth), *self._each(value.values(), depth))

    def _each(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [v if type(v) in PLAIN else self._look(v, depth - 1) for v in values]

    def _object(self, value: Any, kind: type, depth: int) -> Any:
        if isinstance(value, nn.Module):
            found = list[Any]()
            self._module(value, found, found)
            return tuple(found)
        if kind is FunctionType:
            return self._function(value, depth - 1)
        if kind is MethodType:
            return id(value.__func__), self._look(value.__self__, depth - 1)
        if kind is functools.partial:
            return (kind, *(self._look(v, depth - 1) for v in (value.func, value.args, value.keywords)))
        if isinstance(value, np.ndarray):
            small = value.size <= ITEMS and value.dtype != object
            return id(value), value.shape, str(value.dtype), value.tobytes() if small else b""
        inside = getattr(value, "__dict__", None)
        if type(inside) is not dict or len(inside) > ITEMS:
            return id(value)
        return (kind, id(value), *inside, *self._each(inside.values(), depth))


def _held(function: FunctionType) -> tuple[Any, ...]:
    """What a function is closed over, and its defaults."""
    named = function.__kwdefaults__ or {}
    try:
        cells = [cell.cell_contents for cell in (function.__closure__ or ())]
    except ValueError:
        cells = list(function.__closure__ or ())  # one is not filled yet
    return (*cells, *(function.__defaults__ or ()), *named, *named.values())


def _plain(values: Iterable[Any]) -> bool:
    return PLAIN.issuperset(map(type, values))


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


@functools.lru_cache(maxsize=1024)
def _own_classes(kind: type) -> tuple[tuple[type, tuple[FunctionType, ...]], ...]:
    """The user's classes among a module's ancestors, each with its methods."""
    own = [cls for cls in kind.__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES]
    return tuple((cls, tuple(v for v in vars(cls).values() if isinstance(v, FunctionType))) for cls in own)
