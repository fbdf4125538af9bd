"""The methods: each a module with the same three functions.

`jacobian(problem, batch, rows=None, into=None)`
    One block `(B, len(rows), *leaf)` per leaf of the problem, in the order of `problem.leaves`. `rows` is a range
    of the problem's output rows (None for all). `into`, where given, holds one preallocated tensor per leaf to write to
    and return. A method that keeps factors may return a `Block` in a leaf's place when `into` is None.

`vjp(problem, batch, cotangents, per_sample_params=True)`
    `cotangents` is `(K, B, rows)`. One tensor per leaf: `(K, B, *leaf)` for inputs and hidden points; for parameters
    `(K, B, *param)` with `per_sample_params`, else `(K, *param)` summed over the batch. Never builds the Jacobian.

`jvp(problem, batch, tangents)`
    `tangents` holds one `(K, B, *leaf)` per leaf. Returns `(K, B, rows)`.

All three are called inside `problem.session()`, with `batch` from `resolve.place`. `refuse(problem)` gives a reason
why the method cannot serve the problem, known from its shape alone, or the empty string; what only shows in the
running raises `MethodError`. `lacks` names the passes that a method does not have; where it made blocks, products come
from those instead.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

NAMES = ("layerwise", "chain", "reverse", "forward", "backward_loop")
_LACKS = {"layerwise": frozenset(("jvp",)), "chain": frozenset(("jvp", "vjp"))}


def lacks(method: str) -> frozenset[str]:
    """Which of `jvp` and `vjp` the method does not have."""
    return _LACKS.get(method, frozenset())


@functools.cache
def pick(method: str) -> ModuleType:
    """The kernel of this name; loaded when first used."""
    return importlib.import_module(f"jacray_workers.kernels.{method}")
