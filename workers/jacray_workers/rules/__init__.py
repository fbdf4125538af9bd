"""Per-operator rules: what a tap's data and cotangents make of the parameter's block.

A rule takes a `Use` and returns a term per parameter of the call. It raises `Unfit` where the call is not of the form
that it knows; then the general rule takes over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from jacray_workers.rules import conv, elementwise, embedding, linear, norm
from jacray_workers.rules.common import Rule, Terms, Unfit, use
from jacray_workers.rules.generic import generic
from jacray_workers.taps.follow import Tap

Entry = tuple[tuple[str, ...], Rule]


def terms(tap: Tap, g: Tensor) -> Terms:
    """The terms of one tap for cotangents `(R, *target)`."""
    names, rule = table().get(tap.site.func, ((), generic))
    seen = use(tap, names, g)
    try:
        return rule(seen)
    except Unfit:
        return generic(seen)


@functools.cache
def table() -> dict[Callable[..., Any], Entry]:
    """The rules by the functions that torch dispatches."""
    aten = torch.ops.aten
    found: dict[Callable[..., Any], Entry] = {
        F.linear: (linear.LINEAR, linear.linear),
        aten.linear.default: (linear.LINEAR, linear.linear),
        Tensor.__rmatmul__: (linear.RMATMUL, linear.matmul),
        torch.einsum: (linear.EINSUM, linear.einsum),
        aten.einsum.default: (linear.EINSUM, linear.einsum),
        F.layer_norm: (norm.LAYER, norm.over_last),
        F.rms_norm: (norm.RMS, norm.over_last),
        F.group_norm: (norm.GROUP, norm.over_channels),
        F.batch_norm: (norm.BATCH, norm.batch_norm),
        F.instance_norm: (norm.INSTANCE, norm.over_channels),
        F.embedding: (embedding.FUNCTIONAL, embedding.embedding),
        Tensor.__getitem__: (embedding.GETITEM, embedding.getitem),
        aten.convolution.default: (conv.CONVOLUTION, conv.convolution),
    }
    _all(found, ("matmul", "mm", "bmm", "mv"), linear.MATMUL, linear.matmul)
    _all(found, ("__matmul__",), linear.MATMUL, linear.matmul)
    _all(found, ("addmm",), linear.ADDMM, linear.addmm)
    _all(found, ("conv1d", "conv2d", "conv3d"), conv.FORWARD, conv.conv)
    _all(found, [f"conv_transpose{n}d" for n in (1, 2, 3)], conv.TRANSPOSED, conv.conv_transpose)
    _all(found, ("layer_norm",), norm.LAYER, norm.over_last)
    _all(found, ("rms_norm",), norm.RMS, norm.over_last)
    _all(found, ("group_norm",), norm.GROUP, norm.over_channels)
    _all(found, ("batch_norm",), norm.BATCH_LOW, norm.batch_norm)
    _all(found, ("instance_norm",), norm.INSTANCE_LOW, norm.over_channels)
    _all(found, ("prelu",), norm.PRELU, norm.prelu)
    _all(found, ("embedding",), embedding.LOW, embedding.embedding)
    _all(found, ("index_select",), embedding.SELECT, embedding.select)
    _all(found, ("expand", "expand_as", "broadcast_to"), (), elementwise.broadcast)
    _all(found, ("repeat", "tile"), (), elementwise.repeat)
    _all(found, elementwise.FUNCTIONS + elementwise.DUNDERS, elementwise.BINARY, elementwise.elementwise)
    _all(found, ("add", "__add__", "__radd__", "__iadd__"), elementwise.BINARY, elementwise.add)
    _all(found, ("mul", "multiply", "__mul__", "__rmul__", "__imul__"), elementwise.BINARY, elementwise.multiply)
    return found


def _all(found: dict[Callable[..., Any], Entry], names: Any, arguments: tuple[str, ...], rule: Rule) -> None:
    """Enter a rule for the function, the method, the in-place method and the exported operators of each name."""
    for name in names:
        spellings = (name,) if name.startswith("__") else (name, f"{name}_")
        for spelling in spellings:
            homes = [getattr(home, spelling, None) for home in (torch, Tensor)]
            found.update({function: (arguments, rule) for function in homes if function is not None})
            if not name.startswith("__") and hasattr(torch.ops.aten, spelling):
                packet = getattr(torch.ops.aten, spelling)
                exported = [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
                found.update(dict.fromkeys(exported, (arguments, rule)))
