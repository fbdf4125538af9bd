"""`torch.cond` as the branch that it takes.

torch differentiates `torch.cond` by tracing both branches, which fails for much of what models do in them, and has no
rule for it under `torch.func`. At given inputs its derivative is that of the branch taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

COND = torch.ops.higher_order.cond


class Branches(TorchFunctionMode):
    """Runs the branch that the predicate picks in place of the operator.

    Under `vmap` over the predicate this raises as `if` does: the samples then go one at a time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call."""
        if func is not COND:
            return func(*args, **(kwargs or {}))
        with self:
            return _taken(*args, **(kwargs or {}))


def _taken(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    return (true_fn if bool(pred) else false_fn)(*operands)
