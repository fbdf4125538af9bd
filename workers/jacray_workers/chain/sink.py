"""Rewrite a tape so that a choice of positions comes before the calls that work on each position by itself.

`head(norm(h))[:, -1]` becomes `head(norm(h[:, -1]))`: the same numbers from fewer operations, and the one position that
matters becomes a narrow tensor that a chain of Jacobians can be cut at.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from jacray_workers.chain.tape import Node, Tape, trim

# Calls that work on each number by itself, as long as they take one tensor.
POINTWISE = frozenset(
    {
        *("relu", "relu_", "relu6", "gelu", "silu", "elu", "selu", "leaky_relu", "softplus", "mish", "hardtanh"),
        *("tanh", "sigmoid", "logsigmoid", "softsign", "hardswish", "exp", "log", "sin", "cos", "sqrt", "rsqrt"),
        *("abs", "square", "neg", "__neg__", "clamp", "add", "sub", "mul", "div", "truediv", "dropout"),
        *("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__"),
        *("to", "float", "double", "type_as", "contiguous"),
    }
)
_ALL = slice(None)


@dataclass(frozen=True)
class Slot:
    """Where a value of the tape goes among a call's arguments."""

    value: int


def arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments, with a `Slot` for each value."""
    leaves = list(node.leaves)
    for at, value in node.slots:
        leaves[at] = Slot(value)
    if node.spec is None:
        flat = len(leaves) - len(node.keys)
        return tuple(leaves[:flat]), dict(zip(node.keys, leaves[flat:], strict=True))
    args, kwargs = pytree.tree_unflatten(leaves, node.spec)
    return tuple(args), dict(kwargs)


def sink(tape: Tape, shapes: Sequence[tuple[int, ...] | None]) -> Tape:
    """The tape with every choice of positions moved as far to the front as it goes.

    Args:
        tape: what was recorded.
        shapes: of every value; None for those the output does not need.
    """
    known = list(shapes)
    while (moved := _one(tape, known)) is not None:
        tape = moved
    return trim(tape)


def _one(tape: Tape, shapes: list[tuple[int, ...] | None]) -> Tape | None:
    """The tape with one choice moved one call to the front, or None. New values are added to `shapes`."""
    makers = {value: at for at, node in enumerate(tape.nodes) for value in node.makes}
    uses = Counter([tape.output, *(value for node in tape.nodes for value in set(node.needs))])
    for at, node in enumerate(tape.nodes):
        found = _selection(node)
        if found is None or found[0] not in makers or uses[found[0]] != 1 or not node.dep:
            continue
        maker = makers[found[0]]
        swapped = _swap(tape.nodes[maker], node, found[1], shapes, tape)
        if swapped is not None:
            new = len(shapes) - tape.count
            nodes = (*tape.nodes[:maker], *tape.nodes[maker + 1 : at], *swapped, *tape.nodes[at + 1 :])
            dep = tape.dep | set(range(tape.count, tape.count + new))
            return replace(tape, nodes=nodes, count=len(shapes), dep=dep)
    return None


def _selection(node: Node) -> tuple[int, tuple[Any, ...]] | None:
    """The value that a node chooses from, and the index; None for another kind of call or a choice by data."""
    if node.name not in ("__getitem__", "select") or len(node.slots) != 1:
        return None
    args, kwargs = arguments(node)
    if kwargs or not isinstance(args[0], Slot):
        return None
    if node.name == "select":
        dim, index = args[1:]
        return (args[0].value, (*[_ALL] * dim, index)) if dim >= 0 else None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    ok = all(isinstance(part, int | slice | list) or part is Ellipsis for part in index)
    return (args[0].value, index) if ok and sum(isinstance(part, list) for part in index) <= 1 else None


def _swap(
    maker: Node, node: Node, index: tuple[Any, ...], shapes: list[tuple[int, ...] | None], tape: Tape
) -> tuple[Node, Node] | None:
    """The choice before the call that made what it chooses from, or None where that is another function."""
    if not maker.dep or maker.writes >= 0 or len(maker.outs) != 1 or len(node.outs) != 1:
        return None
    if maker.name == "reshape":
        return _swap_reshape(maker, node, index, shapes)
    shape = shapes[maker.outs[0][1]]
    inner = _passes(maker, shapes, tape)
    if inner is None or shape is None or shapes[inner[0]] is None:
        return None
    source, whole_last = inner
    full = _expand(index, len(shape))
    if full is None or (whole_last and full[-1] != _ALL) or len(shapes[source] or ()) != len(shape):
        return None
    return _pair(maker, node, source, full, shapes)


def _pair(
    maker: Node, node: Node, source: int, index: tuple[Any, ...], shapes: list[tuple[int, ...] | None]
) -> tuple[Node, Node]:
    """`choose` from the source, then the maker on what was chosen."""
    value = len(shapes)
    shapes.append(tuple(torch.empty(shapes[source] or (), device="meta")[index].shape))
    chosen = Node(
        func=operator.getitem,
        name="__getitem__",
        leaves=(None, index),
        slots=((0, source),),
        spec=None,
        keys=(),
        outs=((0, value),),
        dep=True,
    )
    slots = tuple((at, value if v == source else v) for at, v in maker.slots)
    return chosen, replace(maker, slots=slots, outs=((0, node.outs[0][1]),))


def _passes(maker: Node, shapes: Sequence[tuple[int, ...] | None], tape: Tape) -> tuple[int, bool] | None:
    """The value that a call works on position by position, and whether it needs the last axis whole."""
    args, kwargs = arguments(maker)
    if not args or not isinstance(args[0], Slot) or args[0].value not in tape.dep:
        return None
    source = args[0].value
    others = [value for value in maker.needs if value != source]
    if maker.needs.count(source) != 1 or any(value in tape.dep for value in others):
        return None
    if maker.name in POINTWISE and all(_rank(shapes, value) <= 1 for value in others):
        return source, bool(others)
    if maker.name == "linear" or (maker.name in ("matmul", "__matmul__") and _rank(shapes, others[0]) == 2):
        return source, True
    if maker.name in ("layer_norm", "rms_norm"):
        sizes = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
        return (source, True) if isinstance(sizes, list | tuple | torch.Size) and len(sizes) == 1 else None
    if maker.name in ("softmax", "log_softmax"):
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return (source, True) if dim == -1 else None
    return None


def _rank(shapes: Sequence[tuple[int, ...] | None], value: int) -> int:
    shape = shapes[value]
    return 99 if shape is None else len(shape)


def _expand(index: tuple[Any, ...], rank: int) -> tuple[Any, ...] | None:
    """The index with one entry per axis."""
    if Ellipsis in [part for part in index if not isinstance(part, list)]:
        at = next(i for i, part in enumerate(index) if part is Ellipsis)
        middle = rank - len(index) + 1
        index = (*index[:at], *[_ALL] * middle, *index[at + 1 :])
    return (*index, *[_ALL] * (rank - len(index))) if len(index) <= rank else None


def _swap_reshape(
    maker: Node, node: Node, index: tuple[Any, ...], shapes: list[tuple[int, ...] | None]
) -> tuple[Node, Node] | None:
    """`x.reshape(B, -1)[:, picks]`, where the picks are whole positions of a `(B, T, V)`, as `x[:, positions]`."""
    source, flat = maker.needs[0], shapes[maker.outs[0][1]]
    shape = shapes[source]
    if shape is None or flat is None or len(shape) != 3 or flat != (shape[0], shape[1] * shape[2]):
        return None
    if len(index) != 2 or index[0] != _ALL or not isinstance(index[1], list):
        return None
    wide, picks = shape[2], index[1]
    positions = [pick // wide for pick in picks[::wide]]
    if picks != list(itertools.chain.from_iterable(range(p * wide, (p + 1) * wide) for p in positions)):
        return None
    chosen, _ = _pair(maker, node, source, (_ALL, positions, _ALL), shapes)
    reshaped = replace(
        maker,
        func=torch.Tensor.reshape,
        leaves=(None, shape[0], len(picks)),
        slots=((0, len(shapes) - 1),),
        spec=None,
        keys=(),
        outs=((0, node.outs[0][1]),),
    )
    return chosen, reshaped
