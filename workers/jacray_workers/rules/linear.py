"""Matrix products with a parameter.

Source: Goodfellow, "Efficient per-example gradient computations" (2015).
"""

from __future__ import annotations

import string

import torch
from torch import Tensor

from jacray_workers.blocks.terms import Outer, Term
from jacray_workers.rules.common import Terms, Unfit, Use, at
from jacray_workers.taps.sites import Path

LINEAR = ("input", "weight", "bias")
MATMUL = ("input", "other")
RMATMUL = ("other", "input")
ADDMM = ("input", "mat1", "mat2", "beta", "alpha")
EINSUM = ("equation", "operands")


def linear(use: Use) -> Terms:
    """`y = x W^T + b` over any number of axes in front of the features."""
    if use.source("input") is not None:
        raise Unfit("input")
    found: Terms = {}
    g = rows_last(use, use.cots, use.tap.shape)
    if (path := use.source("weight")) is not None:
        a = _rows_of(use, "input")
        if g.shape[2] > 1 and g.stride(2) == 0:
            # The same cotangent at every position, as behind a mean over them.
            found[path] = Outer(use.own(path), None, a.sum(dim=1, keepdim=True), g[:, :, :1])
        else:
            found[path] = Outer(use.own(path), None, a, g)
    if (path := use.source("bias")) is not None:
        found[path] = use.summed(path, g)
    return found


def rows_last(use: Use, cots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`(B, R, S, O)` of cotangents whose last axis holds the features.

    Raises:
        Unfit: the batch lies in the features.
    """
    if use.out_axis.dim == len(shape) - 1:
        raise Unfit("features")
    return cots.flatten(2, -2)


def _rows_of(use: Use, name: str) -> Tensor:
    """`(B, S, I)` of an argument whose last axis holds the features."""
    if use.axis(name).dim == use.value(name).dim() - 1:
        raise Unfit(name)
    return _plain_numbers(use.samples(name)).flatten(1, -2)


def _plain_numbers(t: Tensor) -> Tensor:
    """Complex products conjugate on the way back; they take the general rule."""
    if t.is_complex():
        raise Unfit("complex")
    return t


def matmul(use: Use) -> Terms:
    """`x @ y` with a parameter on one side or both."""
    return _product(use, "input", "other", use.cots)


def addmm(use: Use) -> Terms:
    """`beta b + alpha x @ y`."""
    beta, alpha = use.value("beta", 1), use.value("alpha", 1)
    found = {}
    if use.source("mat1") is not None or use.source("mat2") is not None:
        found.update(_product(use, "mat1", "mat2", use.cots if alpha == 1 else use.cots * alpha))
    if (path := use.source("input")) is not None:
        found[path] = use.summed(path, use.cots if beta == 1 else use.cots * beta)
    return found


def _product(use: Use, left: str, right: str, cots: Tensor) -> Terms:
    found: Terms = {}
    for name, other in ((left, right), (right, left)):
        path = use.source(name)
        if path is not None:
            is_left = name == left
            matrix = _matrix(use, path, other, cots, is_left=is_left)
            found[path] = matrix or _tensor(use, path, other, cots, is_left=is_left)
    return found


def _matrix(use: Use, path: Path, other: str, cots: Tensor, *, is_left: bool) -> Term | None:
    """The factored term of a matrix that multiplies data; None where the parameter or the data has another shape."""
    data, own, out = use.value(other), use.own(path), len(use.tap.shape)
    if len(own) != 2 or data.dim() < 2 or out < 2 or use.source(other) is not None:
        return None
    # Features stand last in `x @ W`, and before the last axis in `W @ x`.
    place = 2 if is_left else 1
    if use.axis(other).dim == data.dim() - place or use.out_axis.dim == out - place:
        return None
    a = _plain_numbers(use.samples(other))
    if is_left:
        return Outer(own, None, a.mT.flatten(1, -2), cots.mT.flatten(2, -2))
    return Outer(own, None, a.flatten(1, -2), cots.flatten(2, -2), flip=True)


def _tensor(use: Use, path: Path, other: str, cots: Tensor, *, is_left: bool) -> Term:
    """The dense term of a vector or a stack of matrices, as a contraction in per-sample axes."""
    data = _plain_numbers(use.samples(other)) if use.source(other) is None else None
    if data is None:
        raise Unfit(other)
    own = use.own(path)
    out_labels, param_labels, data_labels = _labels(own, data.dim() - 1, cots.dim() - 2, is_left=is_left)
    sizes = {**dict(zip(out_labels, cots.shape[2:], strict=True))}
    kept = "".join(c for c, n in zip(param_labels, own, strict=True) if sizes.get(c, n) == n)
    spread = [sizes.get(c, n) for c, n in zip(data_labels, data.shape[1:], strict=True)]
    equation = f"ZY{out_labels},Z{data_labels}->ZY{kept}"
    made = torch.einsum(equation, cots, data.expand(data.shape[0], *spread))
    return use.dense(path, made.reshape(*made.shape[:2], *own))


def _labels(own: tuple[int, ...], data: int, out: int, *, is_left: bool) -> tuple[str, str, str]:
    """Einsum labels of the result, the parameter and the data: n and o outer, m summed, stacks aligned at the right."""
    param = len(own)
    left, right = (param, data) if is_left else (data, param)
    stack = string.ascii_lowercase[: max(out - (left > 1) - (right > 1), 0)]
    heads = {True: ("N" if left > 1 else "") + "M", False: "M" + ("O" if right > 1 else "")}

    def labels(dims: int, *, on_left: bool) -> str:
        extra = max(dims - 2, 0)
        return (stack[len(stack) - extra :] if extra else "") + heads[on_left]

    result = stack + ("N" if left > 1 else "") + ("O" if right > 1 else "")
    return result, labels(param, on_left=is_left), labels(data, on_left=not is_left)


def einsum(use: Use) -> Terms:
    """A contraction written with labels, where the batch is a label of its own."""
    equation = use.value("equation")
    if not isinstance(equation, str) or "." in equation:
        raise Unfit("equation")
    inputs, out = _parsed(equation)
    listed = isinstance(use.tap.args[1], list | tuple)
    paths: list[Path] = [(1, i) if listed else (i + 1,) for i in range(len(inputs))]
    batch = out[use.out_axis.dim]
    if (use.out_axis.before, use.out_axis.after) != (1, 1):
        raise Unfit("result")
    sources = [(i, path) for i, path in enumerate(paths) if path in use.tap.sources]
    return {path: _einsum_term(use, paths, inputs, out, batch, i) for i, path in sources}


def _parsed(equation: str) -> tuple[list[str], str]:
    left, arrow, out = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        joined = "".join(inputs)
        out = "".join(sorted(c for c in set(joined) if joined.count(c) == 1))
    return inputs, out


def _einsum_term(use: Use, paths: list[Path], inputs: list[str], out: str, batch: str, place: int) -> Term:
    """The parameter's labels become the result's, with the batch and the rows in front."""
    mine = inputs[place]
    others = [(labels, path) for i, (labels, path) in enumerate(zip(inputs, paths, strict=True)) if i != place]
    for labels, path in others:
        axis = None if path in use.tap.sources else use.tap.site.axis(path)
        if (axis is not None) != (batch in labels) or (axis is not None and labels[axis.dim] != batch):
            raise Unfit("batch label")
    reachable = set(out).union(*(labels for labels, _ in others))
    if batch in mine or len(set(mine)) != len(mine) or not set(mine) <= reachable:
        raise Unfit("parameter labels")
    row = next(c for c in string.ascii_letters if c not in set(mine) | reachable)
    equation = ",".join([row + out, *(labels for labels, _ in others)]) + f"->{batch}{row}{mine}"
    operands = [_plain_numbers(at(use.tap, path)) for _, path in others]
    return use.dense(paths[place], torch.einsum(equation, use.g, *operands))
