"""From a graph's nodes to steps that can be run: every reference, operator and argument is checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.graph.document import MAX_DEPTH, Document
from jacray_workers.models.graph.operators import Operator, check_call, find
from jacray_workers.models.graph.values import Here, Ref, State, decode


@dataclass(frozen=True)
class Slot:
    """A place in the list of a run's values."""

    index: int


@dataclass
class Call:
    """One operator's call.

    Attributes:
        function: what runs.
        args, kwargs: its arguments, with a `Slot` for each value.
        out: where its value goes.
        frees: places that nothing reads afterwards.
    """

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    out: int
    frees: tuple[int, ...] = ()


@dataclass
class Region:
    """What ran inside a submodule.

    Attributes:
        module: its name.
        given: the place of its first tensor argument, or None where only its output is known.
        inner: where that value goes inside.
        body: the steps inside.
        result: the place of its first output tensor, inside.
        out: where the output goes.
        frees: places that nothing reads afterwards.
    """

    module: str
    given: int | None
    inner: int
    body: list[Call | Region] = field(default_factory=list)
    result: int = -1
    out: int = -1
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A graph that can be run.

    Attributes:
        steps: in order.
        states: the place and name of each parameter and buffer that is read.
        size: how many places there are; the inputs take the first.
        output: nested containers with a `Slot` for each tensor.
    """

    steps: list[Call | Region]
    states: tuple[tuple[int, str], ...]
    size: int
    output: Any


def compile_graph(
    document: Document, device: torch.device, wider: Mapping[torch.dtype, torch.dtype] | None = None
) -> Program:
    """Check the nodes and lay out the steps.

    Args:
        document: the graph.
        device: where tensors are made that come from no other.
        wider: dtypes to use in place of those in the graph.

    Raises:
        ModelError: an operator is not allowed, an argument does not fit, or a value is read before it is made.
    """
    return _Compiler(document, device, wider or {}).program()


class _Compiler:
    def __init__(self, document: Document, device: torch.device, wider: Mapping[torch.dtype, torch.dtype]) -> None:
        self.document, self.device, self.wider = document, device, wider
        self.kinds = ["tensor"] * len(document.inputs)
        self.counts: list[int | None] = [None] * len(document.inputs)
        known = [name for entry in document.state for name in entry.names]
        first = len(document.inputs) + len(document.nodes)
        self.places = {name: first + i for i, name in enumerate(known)}
        self.modules = {*document.modules}
        self.read: dict[str, int] = {}
        self.last: dict[int, Call | Region] = {}
        self.open: list[Region] = []
        self.steps: list[Call | Region] = []

    def program(self) -> Program:
        for number, node in enumerate(self.document.nodes, len(self.document.inputs)):
            self._node(number, *node)
        if self.open:
            raise _wrong(f"enters the module {self.open[-1].module} and does not leave it")
        output = self._output(self.document.output)
        kept = {slot.index for slot in _slots(output)} | {*self.read.values()}
        for slot, step in self.last.items():
            if slot not in kept:
                step.frees = (*step.frees, slot)
        states = tuple((place, name) for name, place in self.read.items())
        return Program(
            self.steps, states, len(self.document.inputs) + len(self.document.nodes) + len(self.places), output
        )

    def _node(self, number: int, name: Any, args: Any, kwargs: Any) -> None:
        if name in ("enter", "leave", "output"):
            self._frame(name, args, self._value(decode(kwargs)), number)
            self.kinds.append("tensor")
            self.counts.append(None)
            return
        if not isinstance(name, str) or not isinstance(args, list) or not isinstance(kwargs, dict):
            raise _wrong(f"must have nodes [operator, arguments, keywords], and node {number} is none")
        operator = find(name)
        given, named = [decode(a) for a in args], {str(k): decode(v) for k, v in kwargs.items()}
        check_call(operator, given, named, self._kind)
        self._check_item(operator, given)
        self._check_writes(operator, given)
        if operator.makes:
            # Nothing else says where such a tensor is made, and blank runs must not make real ones.
            named["device"] = Here()
        step = Call(
            operator.function, [self._laid(a) for a in given], {k: self._laid(v) for k, v in named.items()}, number
        )
        for slot in _slots([step.args, *step.kwargs.values()]):
            self.last[slot.index] = step
        self.last.setdefault(number, step)
        self._add(step)
        self.kinds.append(operator.result)
        self.counts.append(operator.count)

    def _frame(self, what: str, module: Any, value: Slot, number: int) -> None:
        if not isinstance(module, str) or module not in self.modules:
            raise _wrong("frames a module that it does not have")
        if what == "enter":
            if len(self.open) >= MAX_DEPTH:
                raise _wrong(f"must nest at most {MAX_DEPTH} modules")
            self.open.append(Region(module, value.index, number))
            return
        region = Region(module, None, number)
        if what == "leave":
            if not self.open or self.open[-1].module != module:
                raise _wrong(f"leaves the module {module} that it is not in")
            region = self.open.pop()
        region.result, region.out = value.index, number
        for place in (region.given, region.inner, value.index):
            if place is not None:
                self.last[place] = region
        self._add(region)

    def _add(self, step: Call | Region) -> None:
        (self.open[-1].body if self.open else self.steps).append(step)

    def _kind(self, value: Ref | State) -> str:
        if isinstance(value, State):
            self._value(value)
            return "tensor"
        self._value(value)
        return self.kinds[value.index]

    def _value(self, value: Any) -> Slot:
        """The place of a value.

        Raises:
            ModelError: it is not made yet, which also keeps cycles out, or not there.
        """
        if isinstance(value, State):
            if value.name not in self.places:
                raise _wrong("reads a parameter or buffer that it does not have")
            self.read[value.name] = self.places[value.name]
            return Slot(self.places[value.name])
        if not isinstance(value, Ref) or value.index >= len(self.kinds):
            raise _wrong("reads a value before it is made, as a cycle would")
        return Slot(value.index)

    def _laid(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._laid(part) for part in value]
        if isinstance(value, Ref | State):
            return self._value(value)
        if isinstance(value, Here):
            return self.device
        return self.wider.get(value, value) if isinstance(value, torch.dtype) else value

    def _check_item(self, operator: Operator, given: Sequence[Any]) -> None:
        if operator.name != "item":
            return
        count = self.counts[given[0].index]
        if given[1] < 0 or (count is not None and given[1] >= count):
            raise _wrong(f"takes item {given[1]} of {count or 'several'} values")

    def _check_writes(self, operator: Operator, given: Sequence[Any]) -> None:
        """A parameter must stay what it is: derivatives are taken with respect to it."""
        if operator.writes and given and isinstance(given[0], State):
            kind = next(e.kind for e in self.document.state if given[0].name in e.names)
            if kind == "parameter":
                raise _wrong(f"writes into a parameter with {operator.name}")

    def _output(self, tree: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise _wrong("must nest its output less deep")
        if isinstance(tree, Mapping) and len(tree) == 1:
            ((tag, inner),) = tree.items()
            if tag in ("list", "tuple") and isinstance(inner, list):
                parts = [self._output(part, depth + 1) for part in inner]
                return parts if tag == "list" else tuple(parts)
            if tag == "dict" and isinstance(inner, list):
                return {_key(pair): self._output(pair[1], depth + 1) for pair in inner}
        value = decode(tree)
        if isinstance(value, Ref | State):
            if self._kind(value) == "several":
                raise _wrong("must return tensors one by one")
            return self._value(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise _wrong("returns what is no tensor")


def _key(pair: Any) -> str | int:
    if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int):
        return pair[0]
    raise _wrong("must return mappings as lists of [key, value]")


def _slots(value: Any) -> Iterator[Slot]:
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _slots(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _slots(part)


def _wrong(what: str) -> ModelError:
    return ModelError("model", f"has a graph that {what}", Plain("a graph file"), "write it with jacray.export")
