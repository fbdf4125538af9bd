"""Graphs captured with several fixed batch sizes, made one graph with the batch size as a value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import ModelError

FRAMES = ("enter", "leave", "output")
SIZES = (3, 5, 8)
"""Not in one step, so that a half of the batch, rounded, is not taken for a multiple of it."""


@dataclass(frozen=True)
class Draft:
    """The parts of a graph file.

    Attributes:
        nodes: calls, their arguments encoded as JSON.
        state: the entries of parameters, buffers and constants.
        tensors: the tensors by first name.
        output: the structure of what the module returns.
    """

    nodes: list[list[Any]]
    state: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    output: Any


class Unlike(Exception):  # noqa: N818 - an answer, not a failure
    """The captures differ in more than numbers that grow with the batch."""

    def __init__(self, reason: ModelError | None = None) -> None:
        super().__init__()
        self.reason = reason


def unify(drafts: Sequence[Draft], inputs: int) -> Draft:
    """One graph from captures with the batch sizes of `SIZES`.

    A whole number that is `a * batch + c` in all three becomes that expression; everything else must be equal.

    Raises:
        Unlike: it is not.
    """
    first = drafts[0]
    for other in drafts[1:]:
        same = first.state == other.state and all(torch.equal(t, other.tensors[k]) for k, t in first.tensors.items())
        if not same or len(first.nodes) != len(other.nodes):
            raise Unlike
    grown = _Grown(inputs)
    nodes = grown.joined([draft.nodes for draft in drafts])
    output = grown.joined([draft.output for draft in drafts])
    made = grown.nodes()
    moved = {old: {"v": old + len(made)} for old in range(inputs, inputs + len(nodes))}
    return replace(first, nodes=made + _renumbered(grown.placed(nodes), moved), output=_renumbered(output, moved))


def without_marks(draft: Draft, inputs: int) -> tuple[Any, Any]:
    """The nodes and the output with every mark taken for what it passes on, without what only marks read."""
    alias: dict[int, Any] = {}
    needed = _needed(draft, inputs)
    kept: list[Any] = []
    for old, (name, args, kwargs) in enumerate(draft.nodes, inputs):
        if name in FRAMES:
            alias[old] = _renumbered(kwargs, alias)
        elif old in needed:
            kept.append([name, _renumbered(args, alias), _renumbered(kwargs, alias)])
            alias[old] = {"v": inputs + len(kept) - 1}
    return kept, _renumbered(draft.output, alias)


def _needed(draft: Draft, inputs: int) -> set[int]:
    """The numbers of what is returned or written in place, and of what these read, marks aside."""
    needed = {*_read(draft.output)}
    for old in range(inputs + len(draft.nodes) - 1, inputs - 1, -1):
        name, args, kwargs = draft.nodes[old - inputs]
        if old in needed or writes(name):
            needed |= {old, *_read(args), *_read(kwargs)}
    return needed


def writes(name: str) -> bool:
    """Whether an operator writes into its first argument."""
    base = name.split(".")[1] if name.startswith("aten.") else ""
    return base.endswith("_") and not base.endswith("__")


def _read(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        if set(value) == {"v"}:
            yield value["v"]
        for part in value.values():
            yield from _read(part)
    elif isinstance(value, list):
        for part in value:
            yield from _read(part)


class _Grown:
    """Numbers that grow with the batch, each as the node that computes it."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.forms: dict[tuple[int, int], int] = {}

    def joined(self, values: Sequence[Any]) -> Any:
        """The value that all captures share, with `(a, c)` for a number `a * batch + c`."""
        first = values[0]
        if all(type(v) is type(first) and v == first for v in values):
            return first
        if all(isinstance(v, list | tuple) and len(v) == len(first) for v in values):
            return [self.joined(parts) for parts in zip(*values, strict=True)]
        if all(isinstance(v, dict) and list(v) == list(first) for v in values):
            return {key: self.joined([v[key] for v in values]) for key in first}
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return self._form(values)
        raise Unlike

    def _form(self, values: Sequence[int]) -> tuple[int, int]:
        slope, rest = divmod(values[1] - values[0], SIZES[1] - SIZES[0])
        start = values[0] - slope * SIZES[0]
        if rest or any(v != slope * size + start for v, size in zip(values, SIZES, strict=True)):
            raise Unlike
        self.forms.setdefault((slope, start), len(self.forms))
        return slope, start

    def nodes(self) -> list[list[Any]]:
        """The batch size, and three nodes for each number made from it."""
        if not self.forms:
            return []
        batch = {"v": self.inputs}
        made: list[list[Any]] = [["size", [{"v": 0}, 0], {}]]
        for slope, start in self.forms:
            made.append(["int.mul", [batch, slope], {}])
            made.append(["int.add", [{"v": self.inputs + len(made) - 1}, start], {}])
        return made

    def placed(self, value: Any) -> Any:
        """The same with references to these nodes for the numbers; to be renumbered afterwards."""
        if isinstance(value, tuple):
            return {"grown": self.inputs + 2 + 2 * self.forms[value]}
        if isinstance(value, dict):
            return {k: self.placed(v) for k, v in value.items()}
        return [self.placed(part) for part in value] if isinstance(value, list) else value


def _renumbered(value: Any, moved: dict[int, Any]) -> Any:
    """Encoded values under other numbers."""
    if isinstance(value, dict):
        if set(value) == {"v"}:
            return moved.get(value["v"], value)
        if set(value) == {"grown"}:
            return {"v": value["grown"]}
        return {k: _renumbered(v, moved) for k, v in value.items()}
    return [_renumbered(part, moved) for part in value] if isinstance(value, list) else value
