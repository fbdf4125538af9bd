"""A model's torch calls as a tape that can be run again, in whole or in part.

The tape is linear and purely functional: every tensor that a call makes or overwrites is a new value with a number,
and a call that writes in place is replayed on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Node:
    """One recorded call.

    Attributes:
        func: what was called.
        name: its short name.
        leaves: the arguments, flattened; None where a value of the tape goes.
        slots: pairs (place among the leaves, value).
        spec: the structure of the arguments, or None where they are flat.
        keys: the keywords that the last leaves go by, where they are flat.
        outs: pairs (place among the flattened results, value).
        writes: the place among the leaves of the tensor that is written in place, or -1.
        written: the value that stands for it afterwards, or -1.
        dep: whether a derivative passes through.
        drop: values that no later node needs.
    """

    func: Callable[..., Any] = field(repr=False)
    name: str
    leaves: tuple[Any, ...] = field(repr=False)
    slots: tuple[tuple[int, int], ...]
    spec: pytree.TreeSpec | None = field(repr=False)
    keys: tuple[str, ...]
    outs: tuple[tuple[int, int], ...]
    writes: int = -1
    written: int = -1
    dep: bool = False
    drop: tuple[int, ...] = ()

    @property
    def needs(self) -> tuple[int, ...]:
        """The values that it takes."""
        return tuple(value for _, value in self.slots)

    @property
    def makes(self) -> tuple[int, ...]:
        """The values that it makes."""
        made = dict.fromkeys(value for _, value in self.outs)
        return tuple(made if self.writes < 0 else made | {self.written: None})

    def run(self, env: Any) -> None:
        """Call it with the values in `env`, and put there what it makes."""
        leaves = list(self.leaves)
        for at, value in self.slots:
            leaves[at] = env[value]
        if self.writes >= 0:
            leaves[self.writes] = env[self.written] = leaves[self.writes].clone()
        if self.spec is None:
            flat = len(leaves) - len(self.keys)
            result = self.func(*leaves[:flat], **dict(zip(self.keys, leaves[flat:], strict=True)))
        else:
            args, kwargs = pytree.tree_unflatten(leaves, self.spec)
            result = self.func(*args, **kwargs)
        if isinstance(result, Tensor):
            for _, value in self.outs:
                env[value] = result
        elif self.outs:
            found = pytree.tree_leaves(result)
            for at, value in self.outs:
                env[value] = found[at]


@dataclass(frozen=True)
class Tape:
    """A model's calls for one shape of batch.

    Attributes:
        nodes: the calls that the output needs, in order.
        leaves: the values of the problem's leaves.
        inputs: pairs (value, place in the batch) of the inputs that are not leaves.
        constants: the tensors that come from outside or depend on nothing, by value.
        output: the value that `problem.forward` returned.
        count: how many values there are.
        dep: the values that a derivative passes through.
        reads: Python looked at numbers that do not depend on the leaves, so the calls hold for these masks and
            constants alone.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[int, ...]
    inputs: tuple[tuple[int, int], ...]
    constants: tuple[tuple[int, Tensor], ...] = field(repr=False)
    output: int
    count: int
    dep: frozenset[int]
    reads: bool = False

    def start(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Any]:
        """The values before the first call."""
        env: list[Any] = [None] * self.count
        for value, tensor in self.constants:
            env[value] = tensor
        for value, index in self.inputs:
            env[value] = batch[index]
        for value, tensor in zip(self.leaves, values, strict=True):
            env[value] = tensor
        return env

    def run(
        self, values: Sequence[Tensor], batch: Sequence[Tensor], *, keep: frozenset[int] | None = None
    ) -> list[Any]:
        """Every value, or with `keep` only those and the output: the others are let go after their last use."""
        env = self.start(values, batch)
        for node in self.nodes:
            if node.dep:
                node.run(env)
            else:
                with torch.no_grad():
                    node.run(env)
            if keep is not None:
                for value in node.drop:
                    if value not in keep:
                        env[value] = None
        return env


def blank(tape: Tape) -> Tape:
    """The tape with tensors like its constants that hold nothing: what may be kept when the model is gone."""
    constants = tuple((value, torch.empty_like(tensor, device="meta")) for value, tensor in tape.constants)
    return replace(tape, constants=constants)


def same_calls(a: Tape, b: Tape) -> bool:
    """Whether two tapes make the same calls with the same plain arguments, on constants that look alike."""
    if (a.leaves, a.inputs, a.output, a.count, a.dep) != (b.leaves, b.inputs, b.output, b.count, b.dep):
        return False
    if [_looks(c) for c in a.constants] != [_looks(c) for c in b.constants] or len(a.nodes) != len(b.nodes):
        return False
    return all(_same_call(x, y) for x, y in zip(a.nodes, b.nodes, strict=True))


def _looks(constant: tuple[int, Tensor]) -> tuple[Any, ...]:
    value, tensor = constant
    return value, tensor.shape, tensor.stride(), tensor.dtype


def _same_call(a: Node, b: Node) -> bool:
    places = (a.slots, a.keys, a.outs, a.writes, a.written) == (b.slots, b.keys, b.outs, b.writes, b.written)
    return (
        places
        and bool(a.func == b.func)
        and a.spec == b.spec
        and len(a.leaves) == len(b.leaves)
        and all(_same_leaf(x, y) for x, y in zip(a.leaves, b.leaves, strict=True))
    )


def _same_leaf(a: Any, b: Any) -> bool:
    """Plain values by value, anything else by identity; 1, 1.0 and True are three arguments."""
    plain = isinstance(a, bool | int | float | complex | str | slice | torch.dtype | torch.device)
    return a is b or (plain and type(a) is type(b) and a == b)


def trim(tape: Tape) -> Tape:
    """The tape without the calls and constants that the output does not need."""
    needed = {tape.output}
    kept: list[Node] = []
    for node in reversed(tape.nodes):
        if needed.isdisjoint(node.makes):
            continue
        last = tuple(dict.fromkeys(v for v in (*node.needs, *node.makes) if v not in needed))
        needed.update(node.needs)
        kept.append(replace(node, drop=last))
    constants = tuple((value, tensor) for value, tensor in tape.constants if value in needed)
    return replace(tape, nodes=tuple(reversed(kept)), constants=constants)
