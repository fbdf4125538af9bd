"""Find out, on two and three samples, what each call that touches a parameter does with the batch.

Which axis of a tensor holds the batch shows in how its shape changes between two batch sizes; how the batch lies inside
a folded axis (`(B * T, F)`, or time first) shows in which of the possible arrangements hold equal values for the
samples that both batches share. Nothing is guessed: what stays ambiguous is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jacray_workers.errors import MethodError

# Far above the rounding of two batch sizes, far below what two samples differ by.
_CLOSE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}


@dataclass(frozen=True)
class Axis:
    """Where the batch lies in a tensor: axis `dim` has size `before * B * after`, in this order."""

    dim: int
    before: int = 1
    after: int = 1


Path = tuple[int | str, ...]
OUT: Path = ("<out>",)


@dataclass(frozen=True, eq=False)
class Site:
    """One call that touches a parameter.

    Attributes:
        func: what is called.
        kind: `tap` where the result holds the batch, `derive` where it does not, `plain` where there is no gradient.
        fits: for the result (`OUT`) and for each tensor argument that is no parameter, every arrangement of the batch
            that the probe cannot tell from the true one; None where it holds no batch.
        varies: whether a plain argument (a size) changes with the batch size.
    """

    func: Callable[..., Any]
    kind: Literal["tap", "derive", "plain"]
    fits: dict[Path, tuple[Axis, ...] | None]
    varies: bool

    def axis(self, path: Path) -> Axis | None:
        """Where the batch lies in an argument or in the result."""
        fits = self.fits[path]
        return None if fits is None else fits[0]


def split(t: Tensor, axis: Axis, size: int, lead: int = 0) -> Tensor:
    """The batch moved to the front of the axes behind the first `lead`.

    Returns:
        `(*lead, B, *shape)`, with `shape` what a batch of one would have.
    """
    dim = axis.dim + lead
    if axis.before == 1 and axis.after == 1:
        return t.movedim(dim, lead).unsqueeze(dim + 1)
    parts = t.unflatten(dim, (axis.before, size, axis.after))
    return torch.flatten(parts.movedim(dim + 1, lead), dim + 1, dim + 2)


def arrangements(two: Tensor, three: Tensor) -> tuple[Axis, ...] | None:
    """How the batch may lie in a tensor, from its values for samples (a, b) and (a, b, c).

    Returns:
        Every arrangement that fits, or None where the tensor holds no batch.

    Raises:
        MethodError: the batch reaches the tensor, but in no way that keeps samples apart.
    """
    if two.dim() != three.dim():
        raise _mixed("the number of axes changes with the batch size")
    changed = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
    if not changed:
        if not _close(two, three):
            raise _mixed("a tensor without a batch axis depends on the batch")
        return None
    dim = changed[0]
    per = three.shape[dim] - two.shape[dim]
    if len(changed) > 1 or two.shape[dim] != 2 * per or per < 0:
        raise _mixed(f"the shape {tuple(two.shape)} for two samples becomes {tuple(three.shape)} for three")
    places = [Axis(dim, per // after, after) for after in range(1, per + 1) if per % after == 0]
    fitting = tuple(p for p in places if _close(split(two, p, 2), split(three, p, 3)[:2]))
    if not fitting:
        raise _mixed("samples change places or depend on each other")
    # The batch in front is the rule, so it comes first among what fits.
    return tuple(sorted(fitting, key=lambda p: p.before))


def defeat(reason: str, way_out: str = "") -> MethodError:
    """The error for a model that this method cannot follow."""
    return MethodError("method", reason, "layerwise", way_out)


def _mixed(what: str) -> MethodError:
    return defeat(f"cannot follow the samples through the model: {what}")


def _close(a: Tensor, b: Tensor) -> bool:
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    near = _CLOSE.get(a.dtype, 5e-2)
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=near, atol=near * scale, equal_nan=True)
