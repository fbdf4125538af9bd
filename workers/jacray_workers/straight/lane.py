"""The derivatives of a plain net called for again: everything but their arithmetic is left out.

What was planned before for a model of this make and a batch of this shape is all that is kept, as the shape of its
result. The model is read at each call, off its modules or off the calls that it makes, so weights that were trained,
loaded or replaced, hooks that were put on and layers that were exchanged in between count: what is no longer a plain
net of the same make goes the long way.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from jacray_workers import pages
from jacray_workers.blocks.block import Block
from jacray_workers.plan import Plan
from jacray_workers.problem.problem import as_module
from jacray_workers.problem.session import BriefSession
from jacray_workers.problem.state import modules_of
from jacray_workers.request import Request
from jacray_workers.straight import convs, factors, running
from jacray_workers.straight.convs import Stack
from jacray_workers.straight.reading import Line, read
from jacray_workers.straight.running import Passage
from jacray_workers.straight.watching import watch

Kind = Literal["inputs", "params", "ntk", "dense"]
# Fields of a request that may be given, and the values with which this is still what is computed.
_FIELDS: dict[Kind, dict[str, tuple[str, ...]]] = {
    "inputs": {"wrt": ("inputs",), "method": ("auto", "chain"), "form": ("auto", "dense")},
    "params": {"wrt": ("params",), "method": ("auto", "layerwise"), "form": ("auto", "factors")},
    "ntk": {"wrt": ("params",), "method": ("auto", "layerwise"), "form": ("auto", "factors")},
    "dense": {"wrt": ("params",), "method": ("auto", "layerwise"), "form": ("dense",)},
}
_KINDS: dict[tuple[str, str], Kind] = {
    ("jacobian", "inputs"): "inputs",
    ("jacobian", "params"): "params",
    ("ntk", "params"): "ntk",
}
_METHODS: dict[Kind, str] = {"inputs": "chain", "params": "layerwise", "ntk": "layerwise", "dense": "layerwise"}
# How far what is noted may lie from what the long way gave, relative to the largest number.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}
# Makes and shapes per model; all are forgotten when there are more.
MOST = 64
_TRAIN = nn.Module.train
_functorch: Any = torch._C._functorch


@dataclass(frozen=True)
class Kept:
    """What is known of a model of some make and batches of some shape.

    Attributes:
        plan: what was planned, which the arithmetic here follows.
        request: what was asked for.
        factored: of parameters by name, whether the plan keeps their blocks in factors; empty for inputs.
    """

    plan: Plan
    request: Request
    factored: dict[str, bool]


class Answer(NamedTuple):
    """A result, and what was known of it before."""

    value: Any
    kept: Kept


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Kept]] = weakref.WeakKeyDictionary()


def recall(model: Any, x: Any, fields: Mapping[str, Any]) -> Answer | None:
    """The one result of a request; None where the long way has to be gone.

    Args:
        model: any model.
        x: the inputs.
        fields: those of the request that were given.
    """
    if type(x) is not Tensor or not isinstance(model, nn.Module):
        return None
    known = _known.get(model)
    kind = None if not known else _asked(fields)
    if not known or kind is None or _surrounded() or not x.is_cpu or x.is_inference():
        return None
    net = _net(model, x, kind)
    kept = None if net is None else known.get(_key(kind, net.line, x, fields))
    return None if net is None or kept is None else Answer(_computed(kind, net, x, kept), kept)


def remember(
    model: Any, x: Any, fields: Mapping[str, Any], values: Mapping[str, Any], plan: Plan, asked: Request
) -> None:
    """Note what was planned, where it comes to one call of the short way.

    Args:
        model: any model.
        x: the inputs.
        fields: those of the request that were given.
        values: what the long way has made of it.
        plan: how.
        asked: the request.
    """
    kind = _asked(fields) if isinstance(model, nn.Module) and type(x) is Tensor else None
    if kind is None or x.device.type != "cpu" or x.is_inference() or _surrounded() or as_module(model) is not model:
        return
    at_once = plan.chunk_size >= plan.samples and plan.shard_count == 1 and plan.row_chunk >= plan.rows
    if plan.method != _METHODS[kind] or not plan.batched or plan.compared or not at_once:
        return
    found = _net(model, x, kind)
    if found is None:
        return
    by_name = values["jacobian"] if kind in ("params", "dense") else {}
    factored = {n: type(block) is Block for n, block in by_name.items()}
    kept = Kept(plan, asked, factored)
    if kind != "inputs" and not _proven(kind, found, x, kept, next(iter(values.values()))):
        return
    known = _known.setdefault(model, {})
    if len(known) >= MOST:
        known.clear()
    known[_key(kind, found.line, x, fields)] = kept


class Net(NamedTuple):
    """A plain net, and the batch's way through it where it is known already."""

    line: Line | Stack
    passage: Passage | None


def _net(model: nn.Module, x: Tensor, kind: Kind) -> Net | None:
    """The plain net that a model is at this moment and for this batch."""
    if kind == "dense":
        stack = convs.read(model)
        return None if stack is None or not stack.takes(x) else Net(stack, None)
    line = read(model)
    found = Net(line, None) if line is not None else _watched(model, x, kind)
    if found is None or isinstance(found.line, Stack) or not found.line.takes(x):
        return None
    return found if kind == "inputs" or _every_parameter_once(model, found.line) else None


def _watched(model: nn.Module, x: Tensor, kind: Kind) -> Net | None:
    parts, own = modules_of(model), dict[int, str]()
    for part in parts:
        if part._backward_hooks or part._backward_pre_hooks or type(part).train is not _TRAIN:
            return None
        for p in part._parameters.values():
            own[id(p)] = ""
    if kind != "inputs":
        own = {id(p): name for name, p in model.named_parameters()}
        x = x.clone()
    with BriefSession(model, parts):
        try:
            seen = watch(model, x, own)
        except Exception:  # noqa: BLE001 - the long way tells what a model raises
            return None
    return None if seen is None else Net(seen.line, seen.passage)


def _every_parameter_once(model: nn.Module, line: Line) -> bool:
    """Whether a net ends in a weight, and its weights and biases are all that the model has, each used once."""
    used = [id(t) for t in (*line.weights, *line.biases) if t is not None]
    held = {id(p) for part in modules_of(model) for p in part._parameters.values() if p is not None}
    fits = all(b is None or b.shape == w.shape[:1] for w, b in zip(line.weights, line.biases, strict=True))
    return fits and not line.gaps[-1] and len(set(used)) == len(used) and held == set(used)


def _computed(kind: Kind, net: Net, x: Tensor, kept: Kept) -> Any:
    """The result: a tensor, or blocks by name."""
    line = net.line
    if isinstance(line, Stack):
        with torch.no_grad():
            return convs.blocks(line, x, list(kept.factored))
    if kind == "inputs":
        shape = kept.plan.arrays[0].shape
        block = pages.empty(shape, x.dtype, x.device)
        running.jacobian(line, x, block.view(*shape[:2], -1), passage=net.passage)
        return block
    with torch.no_grad():
        # Factors are the caller's own: what is done to the inputs later must not change them.
        own = x if kind == "ntk" or net.passage is not None else x.clone()
        found = factors.factors(line, net.passage or running.passed(line, own, whole=True))
        return factors.kernel_matrix(line, found) if kind == "ntk" else factors.blocks(line, found, kept.factored)


def _proven(kind: Kind, net: Net, x: Tensor, kept: Kept, known: Any) -> bool:
    """Whether this way gives what the long way gave; not asked where both do not fit in memory side by side."""
    if 2 * kept.plan.peak_bytes > kept.plan.budget_bytes or x.dtype not in _CLOSE:
        return False
    made = _computed(kind, net, x, kept)
    if kind == "ntk":
        return _close(made, known)
    if kind == "dense":
        return made.keys() == known.keys() and all(_close(made[name], block) for name, block in known.items())
    pairs = [(made[name].terms, block.terms) for name, block in known.items()]
    terms = [each for mine, theirs in pairs for each in zip(mine, theirs, strict=False)]
    if any(len(mine) != len(theirs) for mine, theirs in pairs) or any(a.spec() != b.spec() for a, b in terms):
        return False
    return all(_close(part, b.tensors()[name]) for a, b in terms for name, part in a.tensors().items())


def _close(mine: Tensor, known: Tensor) -> bool:
    size = max(float(known.abs().max()), torch.finfo(known.dtype).tiny)
    return mine.shape == known.shape and float((mine - known).abs().max()) <= _CLOSE[known.dtype] * size


def _key(kind: Kind, line: Line | Stack, x: Tensor, fields: Mapping[str, Any]) -> Hashable:
    # The plan was made for so many threads. What was asked for stands in the receipt as it was given.
    asked = frozenset(_flat(fields).items()) if fields else None
    return kind, line.make, line.names, x.shape, x.dtype, asked, torch.get_num_threads()


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, a list of one result as that result."""
    returns = fields.get("returns")
    single = isinstance(returns, list | tuple) and len(returns) == 1
    return {**fields, "returns": returns[0]} if single else dict(fields)  # type: ignore[index]


def _asked(fields: Mapping[str, Any]) -> Kind | None:
    """Which of the kinds a request is, where it asks for nothing else, and for the model as it is."""
    if not fields:
        return "inputs"
    given = _flat(fields)
    returns, wrt = given.pop("returns", "jacobian"), given.get("wrt", "inputs")
    if type(returns) is not str or type(wrt) is not str:
        return None
    kind = _KINDS.get((returns, wrt))
    if kind is None:
        return None
    kind = "dense" if kind == "params" and given.get("form") == "dense" else kind
    allowed = _FIELDS[kind]
    return kind if all(type(v) is str and v in allowed.get(name, ()) for name, v in given.items()) else None


def _surrounded() -> bool:
    """Whether somebody watches or changes torch's calls around this one."""
    return (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
    )
