"""What the nodes of autograd's graph do to many cotangents at once.

A rule takes the node, the cotangents `(n, *output)` and which inputs need theirs, and returns one `(n, *input)` or None
per input; None in place of the list where this use of the operator is not of the form that it knows. What it returns
lies in memory made for it, or in that of the cotangents; called with `over` it writes over these. Every rule is the
operator's own backward from torch's `derivatives.yaml`; what a forward pass saved is read off the node, which refuses
where it was overwritten since.

Cotangents keep the order in which they lie in memory: where that is sample by sample, so does what is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.kernels import matmul
from jacray_workers.kernels.arrivals import as_it_lies, in_rows, samples_first
from jacray_workers.kernels.sweep_convs import convolution
from jacray_workers.kernels.sweep_views import (
    VIEWS,
    Found,
    axis_of,
    expand,
    mean,
    permute,
    shape_of,
    summed,
    transpose,
    turned,
    view,
)

Rule = Callable[..., Found]

_aten = torch.ops.aten

# Numbers in one cotangent from which a call of its own costs less than what is done to avoid it.
LARGE = 1 << 13
# Columns below which a matrix product is several times slower than with its matrix laid out the other way.
NARROW = 16
# Numbers in a stack of matrices, repeated for each cotangent, up to which all are multiplied in one call.
STACKED = 1 << 18


def _times(g: Tensor, matrix: Tensor) -> Tensor:
    """`g @ matrix` over the last axis, as one product; what is repeated along an axis is multiplied once."""
    repeated = [axis for axis in range(1, g.dim() - 1) if g.stride(axis) == 0 and g.shape[axis] > 1]
    if repeated:
        once = g[tuple(slice(0, 1) if axis in repeated else slice(None) for axis in range(g.dim()))]
        return _times(once, matrix).expand(*g.shape[:-1], matrix.shape[1])
    rows, back = in_rows(g, 1)
    if matrix.shape[1] < NARROW and matrix.stride(1) == 1:
        matrix = matrix.mT.contiguous().mT
    return back(matmul.mm(rows, matrix))


def addmm(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`beta self + alpha mat1 @ mat2` where only `mat1` needs anything; the rows of `g` may fill several axes."""
    if needs != (False, True, False):
        return None
    made = _times(g, node._saved_mat2.mT)
    made = made if node._saved_alpha == 1 else made * node._saved_alpha
    following = node.next_functions[1][0]
    if made.dim() > 3 and not (following.name() in VIEWS and shape_of(following, 0) == tuple(made.shape[1:])):
        made = made.flatten(1, -2)
    return None, made, None


def mm(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`self @ mat2`."""
    left = _times(g, node._saved_mat2.mT) if needs[0] else None
    return left, torch.matmul(node._saved_self.mT, g) if needs[1] else None


def bmm(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`self @ mat2` by the leading axis; a matrix that is the same along it is multiplied once."""
    left = right = None
    if needs[0]:
        other = node._saved_mat2
        left = _times(g, other[0].mT) if other.stride(0) == 0 else _stacked(g, other.mT, left=False)
    if needs[1]:
        right = _stacked(g, node._saved_self.mT, left=True)
    return left, right


def _stacked(g: Tensor, by: Tensor, *, left: bool) -> Tensor:
    """Each cotangent times the same stack of matrices: `(n, N, a, c)` and `(N, ...)`."""
    if g.shape[0] * by.numel() <= STACKED:
        # Small ones in one call: the stack once for each cotangent costs less than the calls.
        every = by.expand(g.shape[0], *by.shape).flatten(0, 1)
        flat = g.flatten(0, 1)
        made: Tensor = (torch.bmm(every, flat) if left else torch.bmm(flat, every)).unflatten(0, g.shape[:2])
        return made
    size = (g.shape[1], by.shape[1], g.shape[3]) if left else (g.shape[1], g.shape[2], by.shape[2])
    out = pages.like(g, (g.shape[0], *size))
    for part, made in zip(g, out, strict=True):
        if left:
            torch.bmm(by, part, out=made)
        else:
            torch.bmm(part, by, out=made)
    return out


def relu(node: Any, g: Tensor, needs: tuple[bool, ...], *, over: bool = False) -> Found:
    """0 where it is off, whatever arrives there."""
    del needs
    result = node._saved_result
    if g.dim() == 5 and g.stride(2) == 1:
        # As the cotangents lie, so that both are read in order.
        result = result.contiguous(memory_format=torch.channels_last)
    target = g if over else as_it_lies(g)
    return (_aten.threshold_backward.grad_input(g, result, 0, grad_input=target),)


def elementwise(node: Any, g: Tensor, needs: tuple[bool, ...], *, over: bool = False) -> Found:
    """A function of one number: its slope, computed once, times each cotangent."""
    del needs
    slope = node(torch.ones(g.shape[1:], dtype=g.dtype, device=g.device))
    return (_product(g, slope, over=over),)


def power(node: Any, g: Tensor, needs: tuple[bool, ...], *, over: bool = False) -> Found:
    """`self ** exponent`; a square under a sum, whose cotangents repeat one number, needs one product and no slope."""
    x = node._saved_self
    once = g[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in g.stride())]
    if node._saved_exponent != 2 or not x.is_floating_point() or once.numel() * 2 > x.numel():
        return elementwise(node, g, needs, over=over)
    return (_product((once * 2).expand_as(g), x, over=False),)


def _product(g: Tensor, other: Any, *, over: bool) -> Tensor:
    """`g * other`, where possible in memory that is there already."""
    if torch.result_type(g, other) != g.dtype:
        made: Tensor = g * other
        return made
    return torch.mul(g, other, out=g if over else as_it_lies(g))


def scaled(node: Any, g: Tensor, needs: tuple[bool, ...], *, over: bool = False) -> Found:
    """`self * other` with another tensor, or a number, that needs nothing itself."""
    if needs[0] and not any(needs[1:]):
        other = node._saved_other
        if shape_of(node, 0) == tuple(g.shape[1:]) and not (isinstance(other, Tensor) and other.is_complex()):
            return (_product(g, other, over=over), *(None for _ in needs[1:]))
    return None


def _call_each(g: Tensor) -> bool:
    """Whether calls for each cotangent are the cheaper way: large ones, each in one piece."""
    return g[0].numel() >= LARGE and not samples_first(g)


def _alongside(g: Tensor, t: Tensor) -> Tensor:
    """What a node saved of every sample, once per cotangent and in their order in memory: `(everything, *behind)`."""
    whole = t.unsqueeze(1).expand(-1, g.shape[0], *t.shape[1:]) if samples_first(g) else t.expand(g.shape[0], *t.shape)
    return pages.reshaped(whole, (g.shape[0] * t.shape[0], *t.shape[1:]))


def layer_norm(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """The norm's own kernel for all cotangents at once, where calls cost more than its input once per cotangent."""
    x, shape = node._saved_input, node._saved_normalized_shape
    if needs != (True, False, False) or x.dim() <= len(shape) or _call_each(g):
        return None
    rows, back = in_rows(g, g.dim() - 2)
    x, mean, scale = (_alongside(g, t) for t in (x, node._saved_result1, node._saved_result2))
    made = _aten.native_layer_norm_backward(
        rows, x, shape, mean, scale, node._saved_weight, node._saved_bias, (True, False, False)
    )
    return back(made[0]), None, None


def softmax(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A softmax over another axis than the first."""
    return _normalised(node, g, needs, _aten._softmax_backward_data)


def log_softmax(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Its logarithm."""
    return _normalised(node, g, needs, _aten._log_softmax_backward_data)


def _normalised(node: Any, g: Tensor, needs: tuple[bool, ...], kernel: Any) -> Found:
    y = node._saved_result
    axis = axis_of(node._saved_dim, max(y.dim(), 1))
    following, nr = node.next_functions[0]
    if needs != (True,) or axis == 0 or following._input_metadata[nr].dtype != y.dtype or _call_each(g):
        return None
    rows, back = in_rows(g, g.dim() - 2)
    return (back(kernel(rows, _alongside(g, y), axis, y.dtype)),)


def add(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Both addends get all of it."""
    if any(need and shape_of(node, at) != tuple(g.shape[1:]) for at, need in enumerate(needs)):
        return None
    alpha = getattr(node, "_saved_alpha", 1)
    found = [g if need else None for need in needs]
    if len(needs) == 2 and needs[1] and alpha != 1:
        found[1] = g * alpha
    return found


def same(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A copy."""
    del node, needs
    return (g,)


_SMOOTH = (
    "Tanh", "Sigmoid", "Gelu", "Silu", "Mish", "Elu", "Softplus", "Exp", "Log", "Log1p", "Expm1", "Sin", "Cos", "Tan",
    "Sinh", "Cosh", "Atan", "Asinh", "Sqrt", "Rsqrt", "Reciprocal", "Erf", "Neg", "LogSigmoid",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **{f"{name}Backward0": elementwise for name in _SMOOTH},
    "PowBackward0": power,
    "ReluBackward0": relu,
    "AddmmBackward0": addmm,
    "MmBackward0": mm,
    "BmmBackward0": bmm,
    "MulBackward0": scaled,
    "MulBackward1": scaled,
    "AddBackward0": add,
    "AddBackward1": add,
    "CloneBackward0": same,
    "AliasBackward0": same,
    "ViewBackward0": view,
    "UnsafeViewBackward0": view,
    "ReshapeAliasBackward0": view,
    "UnsqueezeBackward0": view,
    "SqueezeBackward0": view,
    "SqueezeBackward1": view,
    "SqueezeBackward2": view,
    "TransposeBackward0": transpose,
    "TBackward0": turned,
    "PermuteBackward0": permute,
    "ExpandBackward0": expand,
    "SumBackward1": summed,
    "MeanBackward1": mean,
    "ConvolutionBackward0": convolution,
    "NativeLayerNormBackward0": layer_norm,
    "SoftmaxBackward0": softmax,
    "SafeSoftmaxBackward0": softmax,
    "LogSoftmaxBackward0": log_softmax,
}

# Rules that may write over the cotangents that they are given.
OVERWRITING = frozenset(
    (*(f"{name}Backward0" for name in _SMOOTH), "PowBackward0", "ReluBackward0", "MulBackward0", "MulBackward1")
)
