"""What a job gives back: one attribute per result that was asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jacray_workers.plan import Plan
from jacray_workers.request import RETURNS
from torch import Tensor
from torch.utils import _pytree as pytree


class Result:
    """The results of a job, how they were computed, and the evidence.

    With B samples, `*out` and `*in` the shapes of one sample's output and input, `*param` a parameter's shape and K
    the number of weights or vectors (absent for one):

    Attributes:
        outputs: `(B, *out)`.
        jacobian: `(B, *out, *in)`, for parameters `{name: (B, *out, *param)}`.
        weighted_gradient: `(K, B, *in)`; for parameters `{name: (K, *param)}`, or per sample as asked.
        jvp: `(K, B, *out)`.
        mean_jacobian: the Jacobian's mean over the samples.
        norms, logabsdet: `(B,)`. singular_values: `(B, rank)`, largest first.
        gram, ggn, fisher: `(*in, *in)`, summed over the samples. ntk: `(B, B, rows, rows)` or `(B, B)`.
        plan: the plan that was followed.
        receipt: versions, seed, plan, timings, checks and non-finite numbers, as plain JSON data.

    Only what was asked for is there; `result.names` lists it. Models that take or return pytrees have results in
    the same structure.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        plan: Plan,
        receipt: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    ) -> None:
        self._values = values
        self._receipt = receipt
        self.plan = plan

    @property
    def names(self) -> tuple[str, ...]:
        """The results that were asked for."""
        return tuple(self._values)

    @property
    def receipt(self) -> Mapping[str, Any]:
        """How the result came about, as plain JSON data."""
        if callable(self._receipt):
            self._receipt = self._receipt()
        return self._receipt

    def __getattr__(self, name: str) -> Any:
        # `_values` is missing while an instance is being unpickled or copied.
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(_not_there(name, tuple(values)))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.names]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of a name and its value, so that `dict(result)` works."""
        return iter(self._values.items())

    def __repr__(self) -> str:
        parts = [f"{name}: {_shape(value)}" for name, value in self]
        return f"Result({', '.join(parts)}; {self.plan.samples} samples by {self.plan.method})"


def _not_there(name: str, asked: tuple[str, ...]) -> str:
    held = f"this result holds {', '.join(asked)}"
    if name in RETURNS:
        wanted = ", ".join(repr(n) for n in (*asked, name))
        return f"{name} was not asked for: {held}. Ask for it with returns=[{wanted}]"
    close = difflib.get_close_matches(name, [*RETURNS, "plan", "receipt"], n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"a result has no {name!r}{hint} ({held}, and plan and receipt)"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if hasattr(value, "shape"):
        return f"{tuple(value.shape)} {type(value).__name__}"
    leaves = pytree.tree_leaves(value)
    if isinstance(value, dict):
        return f"{{{len(value)} blocks}}"
    return f"{len(leaves)} arrays"
