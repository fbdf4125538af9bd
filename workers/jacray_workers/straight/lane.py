"""The Jacobian of a plain net called for again: everything but its arithmetic is left out.

What was planned before for a model of this make and a batch of this shape is all that is kept, as the shape of its
result. The model is read at each call, so weights that were trained, loaded or replaced, hooks that were put on and
layers that were exchanged in between count: what is no longer a plain net of the same make goes the long way.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers import pages
from jacray_workers.plan import Plan
from jacray_workers.straight import running
from jacray_workers.straight.reading import Line, read

# Fields of a request that may be given, and the values with which this is still what is computed.
_FIELDS = {"wrt": ("inputs",), "method": ("auto", "chain"), "form": ("auto", "dense")}
# Makes and shapes per model; all are forgotten when there are more.
MOST = 64
_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[int, ...]]] = weakref.WeakKeyDictionary()
_functorch: Any = torch._C._functorch


def recall(model: Any, x: Any, fields: Mapping[str, Any]) -> Tensor | None:
    """`(B, *out, *in)`; None where the long way has to be gone.

    Args:
        model: any model.
        x: the inputs.
        fields: those of the request that were given.
    """
    if type(x) is not Tensor or not isinstance(model, nn.Module):
        return None
    known = _known.get(model)
    if known is None or not _asked(fields) or _surrounded():
        return None
    line = read(model)
    shape = None if line is None else known.get(_key(line, x, fields))
    if line is None or shape is None or not line.takes(x) or x.is_inference():
        return None
    found = pages.empty(shape, x.dtype, x.device)
    running.jacobian(line, x, found.view(*shape[:2], -1))
    return found


def remember(model: Any, x: Any, fields: Mapping[str, Any], plan: Plan) -> None:
    """Note what was planned, where it comes to one call of the short way."""
    if type(x) is not Tensor or x.device.type != "cpu" or not _asked(fields) or _surrounded():
        return
    at_once = plan.chunk_size >= plan.samples and plan.shard_count == 1 and plan.row_chunk >= plan.rows
    line = read(model) if plan.method == "chain" and plan.batched and at_once else None
    if line is None or not line.takes(x):
        return
    known = _known.setdefault(model, {})
    if len(known) >= MOST:
        known.clear()
    known[_key(line, x, fields)] = plan.arrays[0].shape


def _key(line: Line, x: Tensor, fields: Mapping[str, Any]) -> Hashable:
    # The plan was made for so many threads.
    return line.make, x.shape, x.dtype, fields.get("method"), torch.get_num_threads()


def _asked(fields: Mapping[str, Any]) -> bool:
    """Whether a request asks for nothing else than the Jacobian with respect to the inputs, as the model is."""
    return all(type(value) is str and name in _FIELDS and value in _FIELDS[name] for name, value in fields.items())


def _surrounded() -> bool:
    """Whether somebody watches or changes torch's calls around this one."""
    return (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
    )
