"""What the nodes of autograd's graph do to many cotangents at once.

A rule takes the node, the cotangents `(n, *output)` and which inputs need theirs, and returns one `(n, *input)` or None
per input; None in place of the list where this use of the operator is not of the form that it knows. Every rule is
the operator's own backward from torch's `derivatives.yaml`; what a forward pass saved is read off the node, which
refuses where it was overwritten since.

Cotangents keep the order in which they lie in memory: where that is sample by sample, so does what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

Found = Sequence[Tensor | None] | None
Rule = Callable[[Any, Tensor, tuple[bool, ...]], Found]

_aten = torch.ops.aten

VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0")

# Input channels up to which a convolution is too narrow for the library's own kernels.
FEW_CHANNELS = 4
# Columns below which a matrix product is several times slower than with its matrix laid out the other way.
NARROW = 16


def _shape(node: Any, at: int) -> tuple[int, ...]:
    """The shape of what a node's input stands for."""
    following, nr = node.next_functions[at]
    return tuple(following._input_metadata[nr].shape)


def samples_first(g: Tensor) -> bool:
    """Whether the cotangents of one sample lie together in memory."""
    return g.dim() > 1 and g.stride(0) < g.stride(1)


def _in_rows(g: Tensor, keep: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The cotangents as `(everything, *last axes)` in their order in memory, and the way back."""
    if g.dim() >= keep + 2 and samples_first(g):
        turned = g.transpose(0, 1)
        lead = turned.shape[: g.dim() - keep]
        return turned.flatten(0, len(lead) - 1), lambda t: t.unflatten(0, lead).transpose(0, 1)
    lead = g.shape[: g.dim() - keep]
    return g.flatten(0, len(lead) - 1), lambda t: t.unflatten(0, lead)


def _times(g: Tensor, matrix: Tensor) -> Tensor:
    """`g @ matrix` over the last axis, as one product; what is repeated along an axis is multiplied once."""
    repeated = [axis for axis in range(1, g.dim() - 1) if g.stride(axis) == 0 and g.shape[axis] > 1]
    if repeated:
        once = g[tuple(slice(0, 1) if axis in repeated else slice(None) for axis in range(g.dim()))]
        return _times(once, matrix).expand(*g.shape[:-1], matrix.shape[1])
    rows, back = _in_rows(g, 1)
    if matrix.shape[1] < NARROW and matrix.stride(1) == 1:
        matrix = matrix.mT.contiguous().mT
    return back(torch.mm(rows, matrix))


def addmm(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`beta self + alpha mat1 @ mat2` where only `mat1` needs anything; the rows of `g` may fill several axes."""
    if needs != (False, True, False):
        return None
    made = _times(g, node._saved_mat2.mT)
    made = made if node._saved_alpha == 1 else made * node._saved_alpha
    following = node.next_functions[1][0]
    if made.dim() > 3 and not (following.name() in VIEWS and _shape(following, 0) == tuple(made.shape[1:])):
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
    size = (g.shape[1], by.shape[1], g.shape[3]) if left else (g.shape[1], g.shape[2], by.shape[2])
    out = g.new_empty(g.shape[0], *size)
    for part, made in zip(g, out, strict=True):
        if left:
            torch.bmm(by, part, out=made)
        else:
            torch.bmm(part, by, out=made)
    return out


def relu(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """0 where it is off, whatever arrives there."""
    del needs
    result = node._saved_result
    if g.dim() == 5 and g.stride(2) == 1:
        # As the cotangents lie, so that both are read in order.
        result = result.contiguous(memory_format=torch.channels_last)
    return (_aten.threshold_backward(g, result, 0),)


def elementwise(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A function of one number: its slope, computed once, times each cotangent."""
    del needs
    slope = node(torch.ones(g.shape[1:], dtype=g.dtype, device=g.device))
    return (g * slope,)


def scaled(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`self * other` with another tensor, or a number, that needs nothing itself."""
    if needs[0] and not any(needs[1:]):
        other = node._saved_other
        if _shape(node, 0) == tuple(g.shape[1:]) and not (isinstance(other, Tensor) and other.is_complex()):
            return (g * other, *(None for _ in needs[1:]))
    return None


def add(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Both addends get all of it."""
    if any(need and _shape(node, at) != tuple(g.shape[1:]) for at, need in enumerate(needs)):
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


def view(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Another shape for the same numbers; samples stay together where the first axis stays."""
    del needs
    shape = _shape(node, 0)
    if tuple(g.shape[1:]) == shape:
        return (g,)
    following = node.next_functions[0][0]
    if following.name() == "AddmmBackward0" and shape == (math.prod(g.shape[1:-1]), g.shape[-1]):
        # A linear layer over several axes: its rule takes them as they are, and one that repeats stays a view.
        return (g,)
    if g.dim() > 1 and shape and shape[0] == g.shape[1] and samples_first(g):
        return (g.transpose(0, 1).reshape(shape[0], g.shape[0], *shape[1:]).transpose(0, 1),)
    return (g.reshape(g.shape[0], *shape),)


def _dim(number: int, axes: int) -> int:
    """A saved axis; negative ones are kept as unsigned numbers."""
    return (number - (1 << 64) if number >= 1 << 63 else number) % axes


def transpose(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Two axes change places."""
    del needs
    axes = g.dim() - 1
    return (g.transpose(_dim(node._saved_dim0, axes) + 1, _dim(node._saved_dim1, axes) + 1),)


def turned(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`t()`."""
    del node, needs
    return (g.transpose(1, 2) if g.dim() == 3 else g,)


def permute(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """The axes in another order."""
    del needs
    dims = [_dim(d, g.dim() - 1) for d in node._saved_dims]
    return (g.permute(0, *(dims.index(axis) + 1 for axis in range(len(dims)))),)


def expand(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """The sum over the axes along which it was spread."""
    del needs
    return (sum_to(g, _shape(node, 0)),)


def sum_to(g: Tensor, shape: Sequence[int]) -> Tensor:
    """`(n, *spread)` summed to `(n, *shape)`, which broadcasting had spread."""
    extra = g.dim() - 1 - len(shape)
    spread = [*range(1, 1 + extra), *(i for i, n in enumerate(shape, 1 + extra) if n == 1 and g.shape[i] != 1)]
    return g.sum(dim=spread, keepdim=True).reshape(g.shape[0], *shape) if spread else g


def summed(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A sum over axes: every addend gets all of it, without a copy."""
    del needs
    return (_spread(node, g),)


def mean(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A mean over axes."""
    del needs
    count = math.prod(_shape(node, 0)) // max(math.prod(g.shape[1:]), 1)
    return (_spread(node, g / count),)


def _spread(node: Any, g: Tensor) -> Tensor:
    shape = _shape(node, 0)
    if not node._saved_keepdim:
        for axis in sorted(_dim(d, len(shape)) for d in node._saved_dim or range(len(shape))):
            g = g.unsqueeze(axis + 1)
    return g.expand(g.shape[0], *shape)


def convolution(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """A convolution's input: all cotangents as one batch."""
    if needs != (True, False, False) or g.dim() < 4:
        return None
    rows, back = _in_rows(g, g.dim() - 2)
    weight, x = node._saved_weight, node._saved_input
    if rows.dim() != weight.dim():
        return None
    settings = (node._saved_stride, node._saved_padding, node._saved_dilation)
    plane = weight.dim() == 4 and weight.device.type == "cpu"
    if plane and node._saved_groups == 1 and not node._saved_transposed and weight.shape[1] <= FEW_CHANNELS:
        return back(_folded(rows, weight, tuple(x.shape[2:]), *settings)), None, None
    if plane:
        # The library's kernels for this layout are up to four times as fast.
        rows, weight = (t.contiguous(memory_format=torch.channels_last) for t in (rows, weight))
    # Only its shape counts where its own gradient is all that is asked for.
    blank = x.new_empty(1).expand(rows.shape[0], *x.shape[1:])
    made = _aten.convolution_backward(
        rows if plane else rows.contiguous(), blank, weight, None, *settings, node._saved_transposed,
        node._saved_output_padding, node._saved_groups, (True, False, False),
    )  # fmt: skip
    return back(made[0]), None, None


def _folded(rows: Tensor, weight: Tensor, space: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The same as one matrix product and a sum over the places that each input is seen from: for few channels."""
    columns = torch.matmul(weight.flatten(1).mT, rows.flatten(2))
    return F.fold(columns, space, tuple(weight.shape[2:]), dilation, padding, stride)


def joined(node: Any, gs: list[Tensor]) -> Tensor:
    """Parts of one tensor along an axis."""
    return torch.cat(gs, dim=_dim(node._saved_dim, gs[0].dim() - 1) + 1)


def stacked(node: Any, gs: list[Tensor]) -> Tensor:
    """The entries of one tensor along an axis."""
    return torch.stack(gs, dim=_dim(node._saved_dim, gs[0].dim()) + 1)


# Operators with several results, where every one of them gets something.
PARTS: dict[str, Callable[[Any, list[Tensor]], Tensor]] = {
    "SplitBackward0": joined,
    "SplitWithSizesBackward0": joined,
    "UnbindBackward0": stacked,
}

_SMOOTH = (
    "Tanh", "Sigmoid", "Gelu", "Silu", "Mish", "Elu", "Softplus", "Exp", "Log", "Log1p", "Expm1", "Sin", "Cos", "Tan",
    "Sinh", "Cosh", "Atan", "Asinh", "Sqrt", "Rsqrt", "Reciprocal", "Erf", "Neg", "LogSigmoid",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **{f"{name}Backward0": elementwise for name in _SMOOTH},
    "PowBackward0": elementwise,
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
}
