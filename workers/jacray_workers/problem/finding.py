"""The leaves of a problem: what `wrt` names, as tensors to differentiate with respect to."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import InputError, RequestError
from jacray_workers.problem.points import find_module
from jacray_workers.problem.problem import FLOATS, Leaf, Problem
from jacray_workers.problem.state import scripted
from jacray_workers.request import ModulePoint, Request
from jacray_workers.validation import nearest


def leaves_of(problem: Problem, batch: Sequence[Tensor], request: Request) -> tuple[tuple[Leaf, ...], Any, list[str]]:
    """Resolve `wrt` to leaves and to the structure that results have."""
    finder = _Finder(problem, batch)
    trees: dict[str, Any] = {}
    for target in request.wrt_list:
        trees.update(finder.find(target))
    if isinstance(request.wrt, tuple) or len(trees) > 1 or finder.named:
        return tuple(finder.leaves), trees, finder.notes
    return tuple(finder.leaves), next(iter(trees.values())), finder.notes


def integer_error(module: nn.Module, argument: str, tensor: Tensor) -> InputError:
    """The refusal of integers, with the table of embeddings where a derivative can be had."""
    tables = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    way_out = "cast it to a float type if it is a quantity"
    if tables:
        way_out = f"differentiate where the tokens become vectors: wrt={{'module': '{tables[0]}', 'side': 'output'}}"
    return InputError(argument, "must be floating point to be differentiated", str(tensor.dtype)[6:], way_out)


class _Finder:
    """Collects the leaves of several targets; one leaf stands for a tensor named twice."""

    def __init__(self, problem: Problem, batch: Sequence[Tensor]) -> None:
        self.problem, self.batch = problem, batch
        self.leaves: list[Leaf] = []
        self.notes: list[str] = []
        self.named = False

    def find(self, target: str | ModulePoint) -> dict[str, Any]:
        if isinstance(target, ModulePoint):
            return {target.key: self._module(target)}
        if target == "inputs":
            return {"inputs": self._inputs()}
        if target.startswith("inputs."):
            return {target: self._input(target)}
        self.named = True
        return self._params(target)

    def _add(self, leaf: Leaf) -> int:
        for i, known in enumerate(self.leaves):
            if (known.side, known.index, known.name, known.key if leaf.side == "module" else "") == (
                leaf.side,
                leaf.index,
                leaf.name,
                leaf.key if leaf.side == "module" else "",
            ):
                return i
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def _inputs(self) -> Any:
        slots: list[int | None] = []
        for index, name in enumerate(self.problem.call.names):
            key = f"inputs.{name}" if name else "inputs"
            slots.append(self._add(self._input_leaf(index, key)) if self._is_float(index) else None)
        if all(slot is None for slot in slots):
            raise integer_error(self.problem.module, "inputs", self.batch[0])
        return pytree.tree_unflatten(slots, self.problem.call.spec)

    def _input(self, target: str) -> int:
        names = self.problem.call.names
        index = self.problem.call.index(target.removeprefix("inputs."))
        if index is None:
            way_out = (
                nearest(target, [f"inputs.{n}" for n in names])
                if any(names)
                else "the input is one bare tensor: use inputs"
            )
            raise RequestError("wrt", "names no input", target, way_out)
        if not self._is_float(index):
            raise integer_error(self.problem.module, target, self.batch[index])
        return self._add(self._input_leaf(index, target))

    def _input_leaf(self, index: int, key: str) -> Leaf:
        tensor = self.batch[index]
        return Leaf(key, "input", tuple(tensor.shape[1:]), tensor.dtype, index=index)

    def _is_float(self, index: int) -> bool:
        return self.batch[index].dtype in FLOATS

    def _params(self, pattern: str) -> dict[str, Any]:
        module = self.problem.module
        fixed = scripted(module)
        canonical = {id(p): name for name, p in module.named_parameters()}
        everything = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if p.dtype in FLOATS]
        if not everything:
            raise RequestError(
                "wrt", "the model has no parameters", pattern, "use wrt='inputs', or pass the nn.Module itself"
            )
        if pattern == "params":
            chosen = [(n, p) for n, p in everything if canonical[id(p)] == n]
        else:
            hits = [(n, p) for n, p in everything if fnmatch.fnmatchcase(n, pattern)]
            names = {n for n, _ in hits}
            # A tied parameter goes by its first name unless only another name was asked for.
            chosen = [(n, p) for n, p in hits if canonical[id(p)] == n or canonical[id(p)] not in names]
        if fixed.intersection(n for n, _ in chosen):
            rule = "names parameters of a scripted module, in whose places no other values can be put"
            raise RequestError("wrt", rule, pattern, "pass the unscripted module")
        if not chosen:
            raise RequestError(
                "wrt",
                "is neither inputs nor a glob that matches a parameter",
                pattern,
                nearest(pattern, ["inputs", "params", *(n for n, _ in everything)]),
            )
        tensors = self.problem.tensors
        found = {}
        for name, parameter in chosen:
            own = canonical[id(parameter)]
            dtype = tensors.get(own, parameter).dtype
            found[name] = self._add(Leaf(name, "param", tuple(parameter.shape), dtype, name=own))
        return found

    def _module(self, point: ModulePoint) -> int:
        find_module(self.problem.module, point.module, "wrt")
        probe = Leaf(point.key, "module", (), torch.float32, name=point.module)
        value = replace(self.problem, leaves=(probe,)).values(self.batch)[0]
        if value.dtype not in FLOATS:
            raise RequestError(
                "wrt", "must name a point where floating-point values pass", f"{point.key}: {value.dtype}"
            )
        if value.dim() == 0 or value.shape[0] != 1:
            raise RequestError(
                "wrt",
                "must name a point with the batch as its first axis",
                f"{point.key}: shape {tuple(value.shape)} for a batch of one",
            )
        return self._add(replace(probe, shape=tuple(value.shape[1:]), dtype=value.dtype))
