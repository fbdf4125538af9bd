"""Read a plain feed-forward net off its module: a `Sequential` of Linear layers and functions of one number.

Only what is known to the last bit is read: torch's own classes and none derived from them, no hooks, no changed
`forward`, no parametrisation, strided parameters of one type. A model is read afresh at each call, so whatever was done
to it in between counts, and nothing of it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torch.nn.modules import module as globals_of

from jacray_workers.straight.curves import CURVES, Curve

DTYPES = (torch.float32, torch.float64)
# In eval mode these hand on what they are given.
_NOTHING = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_GLOBAL_HOOKS = tuple(
    getattr(globals_of, name)
    for name in (
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    )
)  # fmt: skip
_TOPS = frozenset((nn.Sequential, nn.Linear))
_WEIGHTED = (nn.Linear, nn.Conv2d)
_KNOWN = (nn.Sequential, *_WEIGHTED, nn.Flatten, *_NOTHING, *CURVES)
# What runs when such a module is called, as torch brought it: somebody may have put something else in its place.
_FORWARDS: dict[type[nn.Module], Any] = {kind: getattr(kind, "forward") for kind in _KNOWN}  # noqa: B009
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_LINEAR = F.linear
_CONV_FORWARD: Any = nn.Conv2d._conv_forward
_OWN: Mapping[str, Tensor] = {}


class Bent(NamedTuple):
    """A function of one number, and what has its settings as attributes, such as the module."""

    curve: Curve
    part: Any


class Line(NamedTuple):
    """A net as it stands at this moment.

    Attributes:
        weights: `(out, in)` each, in order.
        biases: one per weight, or None.
        gaps: what stands before each weight, and behind the last.
        flat: the input is flattened to one axis per sample.
        names: of each weight and each bias among the model's parameters; a bias that is none has one too.
        make: numbers of one sample before each weight and behind the last, and whether a function stands there: what
            the way to compute depends on, and no value of a tensor.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    gaps: list[list[Bent]]
    flat: bool
    names: tuple[tuple[str, str], ...]
    make: tuple[tuple[int, ...], tuple[bool, ...]]

    @classmethod
    def of(
        cls,
        weights: list[Tensor],
        biases: list[Tensor | None],
        gaps: list[list[Bent]],
        flat: bool,
        names: list[tuple[str, str]],
    ) -> Line:
        """The net of these parts."""
        widths = (*[w.shape[1] for w in weights], weights[-1].shape[0])
        return cls(weights, biases, gaps, flat, tuple(names), (widths, tuple([bool(gap) for gap in gaps])))

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of one sample before each weight, and behind the last."""
        return self.make[0]

    def takes(self, x: Tensor) -> bool:
        """Whether these inputs, `(B, *in)`, go through it sample by sample as one row each."""
        first, shape = self.weights[0], x.shape
        if len(shape) < 2 or shape[0] == 0 or not (self.flat or len(shape) == 2):
            return False
        fits = math.prod(shape[1:]) == self.make[0][0]
        return fits and x.layout is torch.strided and x.dtype is first.dtype and x.device == first.device


def read(module: Any, own: Mapping[str, Tensor] = _OWN) -> Line | None:
    """The net that a module is in eval mode; None where it is none that is known in full.

    Args:
        module: any module.
        own: tensors by name that stand for the module's parameters.
    """
    if type(module) not in _TOPS or changed():
        return None
    parts = _parts(module, "", [])
    return None if parts is None else _line(parts, own)


def changed() -> bool:
    """Whether a module's call does more, for all modules, than torch brought."""
    if any(_GLOBAL_HOOKS) or F.linear is not _LINEAR:
        return True
    return nn.Module.__call__ is not _CALL or nn.Module._call_impl is not _CALL_IMPL


def _line(parts: list[tuple[str, Any]], own: Mapping[str, Tensor]) -> Line | None:
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    gaps: list[list[Bent]] = [[]]
    names: list[tuple[str, str]] = []
    flat = False
    for path, part in parts:
        kind = type(part)
        if kind is nn.Conv2d:
            return None
        if kind is nn.Linear:
            pair = _tensors(part, path, own)
            if pair is None or (weights and not _follows(weights[-1], pair[0])):
                return None
            weights.append(pair[0])
            biases.append(pair[1])
            names.append((f"{path}weight", f"{path}bias"))
            gaps.append([])
        elif kind in CURVES:
            gaps[-1].append(Bent(CURVES[kind], part))
        elif kind is nn.Flatten:
            if part.start_dim != 1 or part.end_dim != -1:
                return None
            flat = flat or not weights
    if not weights:
        return None
    return Line.of(weights, biases, gaps, flat, names)


def _parts(module: Any, path: str, found: list[tuple[str, Any]]) -> list[tuple[str, Any]] | None:
    """The modules in the order in which they run, those of nested sequences in their places; None of unknown ones."""
    kind = type(module)
    forward = _FORWARDS.get(kind)
    if forward is None or kind.forward is not forward or not _untouched(module.__dict__):
        return None
    if kind not in _WEIGHTED and module._parameters:
        return None
    if kind is not nn.Sequential:
        found.append((path, module))
        return found
    for name, part in module._modules.items():
        if _parts(part, f"{path}{name}.", found) is None:
            return None
    return found


def _untouched(held: dict[str, Any]) -> bool:
    """No hooks, and no forward but the class's own."""
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
    )


def parts_of(module: nn.Module) -> list[tuple[str, Any]] | None:
    """The modules that a sequence runs, by their paths; None where it holds others than known ones."""
    return None if changed() else _parts(module, "", [])


def head_of(parts: list[tuple[str, Any]]) -> Line | None:
    """The net of Linear layers that parts are which begin by flattening; one that bends neither first nor last."""
    line = _line(parts, _OWN)
    return line if line is not None and line.flat and not line.gaps[0] and not line.gaps[-1] else None


def curve_of(part: nn.Module) -> Bent | None:
    """The function of one number that a module is."""
    kind = type(part)
    return Bent(CURVES[kind], part) if kind in CURVES else None


def conv_tensors(part: nn.Conv2d, path: str) -> tuple[Tensor, Tensor | None] | None:
    """A convolution's weight and bias, where it has one group, pads with as many zeros on both sides, or none."""
    changed_call = nn.Conv2d._conv_forward is not _CONV_FORWARD or "_conv_forward" in part.__dict__
    plain = part.groups == 1 and part.padding_mode == "zeros" and part.transposed is False
    numbers = (part.stride, part.padding, part.dilation)
    pairs = all(type(n) is tuple and len(n) == 2 and all(type(each) is int for each in n) for n in numbers)
    return _tensors(part, path, _OWN, axes=4) if plain and pairs and not changed_call else None


def _tensors(
    part: nn.Module, path: str, own: Mapping[str, Tensor], axes: int = 2
) -> tuple[Tensor, Tensor | None] | None:
    """The weight, of so many axes, and the bias of a Linear or a convolution."""
    table: dict[str, Any] = part._parameters
    if len(table) != 2 or part._buffers or part._modules:
        return None
    weight: Any = table.get("weight")
    bias: Any = table.get("bias")
    if own:
        weight, bias = own.get(f"{path}weight", weight), own.get(f"{path}bias", bias)
    good = _plain(weight, own) and weight.dim() == axes
    if not good or not (bias is None or (_plain(bias, own) and bias.shape == weight.shape[:1])):
        return None
    alike = bias is None or (bias.dtype is weight.dtype and bias.device == weight.device)
    return (weight, bias) if alike else None


def _plain(tensor: Any, own: Mapping[str, Tensor]) -> bool:
    """A dense tensor of a type that is computed in, and no class of somebody's; a parameter unless it was put in."""
    kind = type(tensor)
    known = kind is nn.Parameter or (bool(own) and kind is Tensor)
    return known and tensor.dtype in DTYPES and tensor.layout is torch.strided and not tensor.is_inference()


def _follows(before: Tensor, weight: Tensor) -> bool:
    return before.shape[0] == weight.shape[1] and before.dtype is weight.dtype and before.device == weight.device
