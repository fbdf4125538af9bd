"""What the nodes of autograd's graph that only move, spread or add up numbers do to many cotangents at once.

The rules are of the form that `sweep_rules` describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers import pages
from jacray_workers.kernels.arrivals import samples_first

Found = Sequence[Tensor | None] | None

VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0")


def shape_of(node: Any, at: int) -> tuple[int, ...]:
    """The shape of what a node's input stands for."""
    following, nr = node.next_functions[at]
    return tuple(following._input_metadata[nr].shape)


def view(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Another shape for the same numbers; samples stay together where the first axis stays."""
    del needs
    shape = shape_of(node, 0)
    if tuple(g.shape[1:]) == shape:
        return (g,)
    following = node.next_functions[0][0]
    if following.name() == "AddmmBackward0" and shape == (math.prod(g.shape[1:-1]), g.shape[-1]):
        # A linear layer over several axes: its rule takes them as they are, and one that repeats stays a view.
        return (g,)
    if g.dim() > 1 and shape and shape[0] == g.shape[1] and samples_first(g):
        return (pages.reshaped(g.transpose(0, 1), (shape[0], g.shape[0], *shape[1:])).transpose(0, 1),)
    return (pages.reshaped(g, (g.shape[0], *shape)),)


def _signed(number: int) -> int:
    """A saved number; negative ones are kept as unsigned."""
    return number - (1 << 64) if number >= 1 << 63 else number


def axis_of(number: int, axes: int) -> int:
    """A saved axis."""
    return _signed(number) % axes


def transpose(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """Two axes change places."""
    del needs
    axes = g.dim() - 1
    return (g.transpose(axis_of(node._saved_dim0, axes) + 1, axis_of(node._saved_dim1, axes) + 1),)


def turned(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """`t()`."""
    del node, needs
    return (g.transpose(1, 2) if g.dim() == 3 else g,)


def permute(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """The axes in another order."""
    del needs
    dims = [axis_of(d, g.dim() - 1) for d in node._saved_dims]
    return (g.permute(0, *(dims.index(axis) + 1 for axis in range(len(dims)))),)


def expand(node: Any, g: Tensor, needs: tuple[bool, ...]) -> Found:
    """The sum over the axes along which it was spread."""
    del needs
    return (sum_to(g, shape_of(node, 0)),)


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
    count = math.prod(shape_of(node, 0)) // max(math.prod(g.shape[1:]), 1)
    return (_spread(node, g / count),)


def _spread(node: Any, g: Tensor) -> Tensor:
    shape = shape_of(node, 0)
    if not node._saved_keepdim:
        for axis in sorted(axis_of(d, len(shape)) for d in node._saved_dim or range(len(shape))):
            g = g.unsqueeze(axis + 1)
    return g.expand(g.shape[0], *shape)


def joined(node: Any, gs: list[Tensor]) -> Tensor:
    """Parts of one tensor along an axis."""
    return torch.cat(gs, dim=axis_of(node._saved_dim, gs[0].dim() - 1) + 1)


def stacked(node: Any, gs: list[Tensor]) -> Tensor:
    """The entries of one tensor along an axis."""
    return torch.stack(gs, dim=axis_of(node._saved_dim, gs[0].dim()) + 1)


def selected(node: Any) -> tuple[Any, ...]:
    """Which part of its input an entry along an axis is."""
    return (*[slice(None)] * axis_of(node._saved_dim, len(shape_of(node, 0))), _signed(node._saved_index))


def sliced(node: Any) -> tuple[Any, ...]:
    """Which part of its input a slice along an axis is."""
    part = slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step)
    return (*[slice(None)] * axis_of(node._saved_dim, len(shape_of(node, 0))), part)


# Operators with several results, where every one of them gets something.
PARTS: dict[str, Callable[[Any, list[Tensor]], Tensor]] = {
    "SplitBackward0": joined,
    "SplitWithSizesBackward0": joined,
    "UnbindBackward0": stacked,
}


# Operators that show a part of their input: what arrives is added there, and only there.
WINDOWS: dict[str, Callable[[Any], tuple[Any, ...]]] = {"SelectBackward0": selected, "SliceBackward0": sliced}
