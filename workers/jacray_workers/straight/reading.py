"""Read a plain feed-forward net off its module: a `Sequential` of Linear layers and functions of one number.

Only what is known to the last bit is read: torch's own classes and none derived from them, no hooks, no changed
`forward`, no parametrisation, strided parameters of one type. A model is read afresh at each call, so whatever was done
to it in between counts, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torch.nn.modules import module as globals_of

from jacray_workers.straight.curves import CURVES, Curve

_DTYPES = (torch.float32, torch.float64)
# In eval mode these hand on what they are given.
_NOTHING = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(globals_of, name)
    for name in (
        "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    )
)  # fmt: skip
_KNOWN = (nn.Sequential, nn.Linear, nn.Flatten, *_NOTHING, *CURVES)
# What runs when such a module is called, as torch brought it: somebody may have put something else in its place.
_FORWARDS: dict[type[nn.Module], Any] = {kind: getattr(kind, "forward") for kind in _KNOWN}  # noqa: B009
_CALLS = (nn.Module.__call__, nn.Module._call_impl)
_LINEAR = F.linear
_OWN: Mapping[str, Tensor] = {}


class Bent(NamedTuple):
    """A function of one number, and the module that holds its settings."""

    curve: Curve
    part: nn.Module


@dataclass(frozen=True)
class Line:
    """A net as it stands at this moment.

    Attributes:
        weights: `(out, in)` each, in order.
        biases: one per weight, or None.
        gaps: what stands before each weight, and behind the last.
        flat: the input is flattened to one axis per sample.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    gaps: tuple[tuple[Bent, ...], ...]
    flat: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of one sample before each weight, and behind the last."""
        return (*(w.shape[1] for w in self.weights), self.weights[-1].shape[0])

    @property
    def make(self) -> tuple[Any, ...]:
        """What the way to compute depends on, and no value of a tensor."""
        return self.widths, tuple(bool(gap) for gap in self.gaps)

    def takes(self, x: Tensor) -> bool:
        """Whether these inputs, `(B, *in)`, go through it sample by sample as one row each."""
        size = x.numel() // max(x.shape[0], 1) if x.dim() > 1 else -1
        plain = x.layout is torch.strided and x.dtype is self.weights[0].dtype and x.device == self.weights[0].device
        return plain and size == self.weights[0].shape[1] and (self.flat or x.dim() == 2)


def read(module: Any, own: Mapping[str, Tensor] = _OWN) -> Line | None:
    """The net that a module is in eval mode; None where it is none that is known in full.

    Args:
        module: any module.
        own: tensors by name that stand for the module's parameters.
    """
    if type(module) not in (nn.Sequential, nn.Linear) or any(_GLOBAL_HOOKS):
        return None
    if (nn.Module.__call__, nn.Module._call_impl) != _CALLS or F.linear is not _LINEAR:
        return None
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    gaps: list[list[Bent]] = [[]]
    flat = False
    for path, part in _parts(module, ""):
        kind = type(part)
        if kind not in _FORWARDS or not _untouched(part):
            return None
        if kind is nn.Linear:
            pair = _tensors(part, path, own)
            if pair is None or (weights and not _follows(weights[-1], pair[0])):
                return None
            weights.append(pair[0])
            biases.append(pair[1])
            gaps.append([])
        elif kind in CURVES:
            gaps[-1].append(Bent(CURVES[kind], part))
        elif kind is nn.Flatten:
            if part.start_dim != 1 or part.end_dim != -1:
                return None
            flat = flat or not weights
    return Line(tuple(weights), tuple(biases), tuple(map(tuple, gaps)), flat) if weights else None


def _parts(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The modules in the order in which they run, those of nested sequences in their places."""
    yield path, module
    if type(module) is nn.Sequential:
        for name, part in module._modules.items():
            yield from _parts(part, f"{path}{name}.")


def _untouched(part: nn.Module) -> bool:
    """No hooks, and the class's own forward, as torch brought it."""
    held = part.__dict__
    hooked = any(held[name] for name in _HOOKS)
    return not hooked and "forward" not in held and type(part).forward is _FORWARDS[type(part)]


def _tensors(part: nn.Module, path: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """A Linear's weight and bias."""
    table: dict[str, Any] = part._parameters
    if len(table) != 2 or part._buffers or part._modules:
        return None
    weight: Any = table.get("weight")
    bias: Any = table.get("bias")
    if own:
        weight, bias = own.get(f"{path}weight", weight), own.get(f"{path}bias", bias)
    good = _plain(weight, own) and weight.dim() == 2
    if not good or not (bias is None or (_plain(bias, own) and bias.shape == weight.shape[:1])):
        return None
    alike = bias is None or (bias.dtype is weight.dtype and bias.device == weight.device)
    return (weight, bias) if alike else None


def _plain(tensor: Any, own: Mapping[str, Tensor]) -> bool:
    """A dense tensor of a type that is computed in, and no class of somebody's; a parameter unless it was put in."""
    kind = type(tensor)
    known = kind is nn.Parameter or (bool(own) and kind is Tensor)
    return known and tensor.dtype in _DTYPES and tensor.layout is torch.strided and not tensor.is_inference()


def _follows(before: Tensor, weight: Tensor) -> bool:
    return before.shape[0] == weight.shape[1] and before.dtype is weight.dtype and before.device == weight.device
