"""What a model keeps from one call to the next, so that every pass can start from what the job found.

A module may count its calls, fill a cache or write into its own parameters. Its Jacobian is then that of the function
it was when the job began, and the passes of a job must not see each other.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jacray_workers.planning.watching import Watcher
from jacray_workers.problem.branches import COND

# Tables that belong to `nn.Module` itself.
OWN = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_CONTAINERS = (dict, OrderedDict, list, set, deque)
_SOURCES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# How deep containers within containers are looked into: a cache by layer, by name, is two.
_DEPTH = 3


def same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """The same keys in the same order with identical values; equality would ask tensors for a truth value."""
    return len(now) == len(before) and all(map(is_, now.values(), before.values())) and [*now] == [*before]


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all within it, each once: what `modules()` gives, in another order at a tenth of the cost."""
    found = {id(module): module}
    ahead = [module]
    while ahead:
        for part in ahead.pop()._modules.values():
            if part is not None and id(part) not in found:
                found[id(part)] = part
                ahead.append(part)
    return list(found.values())


class Snapshot:
    """The attributes of every submodule as they stand.

    Args:
        module: the model.
        deep: look into containers and sources of random numbers too, as models that keep a state need it.
        parts: the module and all within it, where that is known.
    """

    def __init__(self, module: nn.Module, *, deep: bool, parts: Sequence[nn.Module] | None = None) -> None:
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        # A module's own tables, of which most hold nothing.
        self._filled: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._bare: list[dict[Any, Any]] = []
        for m in modules_of(module) if parts is None else parts:
            attributes = m.__dict__.copy()
            self._modules.append((m, attributes))
            for name in OWN:
                table = attributes.get(name)
                # Those of scripted modules are no dicts.
                if isinstance(table, dict):
                    if table:
                        self._filled.append((table, table.copy()))
                    else:
                        self._bare.append(table)
        self._containers: list[tuple[Any, Any]] = []
        self._sources: list[tuple[Any, Any]] = []
        if deep:
            seen: set[int] = set()
            for _, attributes in self._modules:
                for name, value in attributes.items():
                    if name not in OWN:
                        self._look(value, seen, _DEPTH)

    def _look(self, value: Any, seen: set[int], depth: int) -> None:
        if isinstance(value, _SOURCES):
            self._sources.append((value, _state_of(value)))
        if type(value) not in _CONTAINERS or id(value) in seen or depth == 0:
            return
        seen.add(id(value))
        self._containers.append((value, copy.copy(value)))
        for part in value.values() if isinstance(value, dict) else value:
            self._look(part, seen, depth - 1)

    def changed(self) -> bool:
        """Whether anything is no longer as it was."""
        return (
            any(not same(m.__dict__, attributes) for m, attributes in self._modules)
            or any(not _same_contents(now, before) for now, before in self._containers)
            or any(not _equal(_state_of(source), state) for source, state in self._sources)
        )

    def restore(self) -> None:
        """Put everything back."""
        for m, attributes in self._modules:
            if not same(m.__dict__, attributes):
                m.__dict__.clear()
                m.__dict__.update(attributes)
        for table, held in self._filled:
            if not same(table, held):
                table.clear()
                table.update(held)
        for table in self._bare:
            if table:
                table.clear()
        for now, before in self._containers:
            if not _same_contents(now, before):
                now.clear()
                now.extend(before) if isinstance(now, list | deque) else now.update(before)
        for source, state in self._sources:
            _set_state(source, state)


def scripted(module: nn.Module) -> frozenset[str]:
    """The names of the parameters and buffers in scripted modules, in whose places nothing else can be put."""
    if not any(isinstance(part, torch.jit.ScriptModule) for part in modules_of(module)):
        return frozenset()
    parts = [(path, part) for path, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    return frozenset(
        f"{path}.{name}" if path else name
        for path, part in parts
        for name, _ in (*part.named_parameters(), *part.named_buffers())
    )


@contextlib.contextmanager
def kept(module: nn.Module, *, deep: bool, parts: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """The modules' attributes, counters, caches and tables come back as they were."""
    before = Snapshot(module, deep=deep, parts=parts)
    try:
        yield
    finally:
        before.restore()


def _same_contents(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return same(now, before)
    if isinstance(now, set):
        return bool(now == before)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _state_of(source: Any) -> Any:
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, np.random.Generator):
        return copy.deepcopy(source.bit_generator.state)
    return source.get_state() if isinstance(source, np.random.RandomState) else source.getstate()


def _set_state(source: Any, state: Any) -> None:
    if isinstance(source, torch.Generator | np.random.RandomState):
        source.set_state(state)
    elif isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    else:
        source.setstate(state)


def _equal(a: Any, b: Any) -> bool:
    """Whether two states of a source of random numbers are the same."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(map(_equal, a, b))
    return bool(np.array_equal(a, b))


class Writes(Watcher):
    """Notices which of a model's tensors a pass writes into, and puts their values back; and whether it branches.

    Args:
        tensors: parameters and buffers by name, as the model sees them.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.saved: dict[str, Tensor] = {}
        self.branches = False
        self._tensors = tensors
        self._names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            if tensor.layout == torch.strided:
                self._names.setdefault(tensor.untyped_storage()._cdata, []).append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.branches = self.branches or func is COND
        for tensor in written_by(func, args, kwargs or {}):
            for name in self._names.get(tensor.untyped_storage()._cdata, ()):
                if name not in self.saved:
                    self.saved[name] = self._tensors[name].detach().clone()
        return func(*args, **(kwargs or {}))

    def undo(self) -> None:
        """Give the tensors the values that they had."""
        for name, value in self.saved.items():
            tensor = self._tensors[name].detach()
            with torch.no_grad(), torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor):
                tensor.copy_(value)


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The strided tensors that a call of an operator writes into."""
    schema = getattr(func, "_schema", None)
    for at, argument in enumerate(schema.arguments if schema is not None and schema.is_mutable else ()):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                yield tensor
