"""Which module couples the samples of a batch: the first whose outputs mix what its inputs keep apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.trust.evidence import Probe


@dataclass(frozen=True)
class Blame:
    """Who couples the samples.

    Attributes:
        name: of the module; the empty string for the model's own forward, or where it is unclear.
        why: how it does so.
        way_out: how to go on.
    """

    name: str
    why: str
    way_out: str


@dataclass(frozen=True)
class _Call:
    """One call of a module: the tensors that went in and came out."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def blame_values(probe: Probe, victim: int, tolerance: float) -> Blame:
    """The module whose outputs for other samples move with sample `victim` although its inputs for them do not."""
    poison = probe.poisoned(victim)
    if poison is None:
        return _unclear(probe)
    with torch.no_grad():
        before, _ = _record(probe, probe.batch, lambda t: t.detach().clone())
        after, _ = _record(probe, poison[0], lambda t: t.detach().clone())
    if [call.name for call in before] != [call.name for call in after]:
        return _unclear(probe)

    def apart(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
        return all(_confined(_moved(x, y, tolerance), victim, probe.size) for x, y in zip(xs, ys, strict=False))

    for a, b in zip(before, after, strict=True):
        if apart(a.inputs, b.inputs) and not apart(a.outputs, b.outputs):
            return _describe(probe, a.name)
    return _unclear(probe)


def blame_derivatives(probe: Probe, sample: int) -> Blame:
    """The module through which the derivative of sample `sample` reaches the others."""
    values = [value.detach().requires_grad_() for value in probe.values(probe.batch)]
    try:
        calls, y = _record(probe, probe.batch, lambda t: t, values)
        tensors = [t for call in calls for t in (*call.inputs, *call.outputs) if t.requires_grad]
        found = torch.autograd.grad(probe.number(y, sample), tensors, allow_unused=True)
        grads = dict(zip(map(id, tensors), found, strict=True))
    except RuntimeError:
        return _unclear(probe)

    def apart(found: Sequence[Tensor]) -> bool:
        reached = [g for t in found if (g := grads.get(id(t))) is not None]
        return all(_confined(torch.nan_to_num(g) != 0, sample, probe.size) for g in reached)

    for call in calls:
        if apart(call.outputs) and not apart(call.inputs):
            return _describe(probe, call.name)
    return _unclear(probe)


def _record(
    probe: Probe, batch: Sequence[Tensor], keep: Callable[[Tensor], Tensor], values: Sequence[Tensor] | None = None
) -> tuple[list[_Call], Tensor]:
    """Every call of a submodule during a pass, in the order in which they end, and the outputs."""
    calls: list[_Call] = []
    with contextlib.ExitStack() as stack:
        for name, module in probe.problem.module.named_modules():
            stack.enter_context(_recording(module, name, calls, keep))
        y = probe.rows(batch, values)
    return calls, y


@contextlib.contextmanager
def _recording(module: nn.Module, name: str, calls: list[_Call], keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    # A module may be called by itself again, and may write into its input: what goes in is kept before the call.
    entered: list[tuple[Tensor, ...]] = []

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(tuple(keep(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)))

    def after(_module: nn.Module, _args: Any, result: Any) -> None:
        found = tuple(keep(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor))
        calls.append(_Call(name, entered.pop(), found))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """Where two tensors differ by more than rounding."""
    if x.shape != y.shape:
        return torch.ones((), dtype=torch.bool)
    if not x.is_floating_point():
        return x != y
    size = torch.nan_to_num(torch.maximum(x.abs(), y.abs()), nan=0.0, posinf=0.0)
    scale = float(size.amax()) if size.numel() else 0.0
    same = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= tolerance * scale)
    return ~same


def _confined(moved: Tensor, sample: int, size: int) -> bool:
    """Whether everything that moved belongs to one sample, for some axis that runs over the samples.

    An axis may also run over samples and something else at once, as after a reshape to (B * T, ...) or (T * B, ...).
    """
    if not bool(moved.any()):
        return True
    for axis, length in enumerate(moved.shape):
        if length % size == 0:
            places = moved.movedim(axis, 0).reshape(length, -1).any(1).nonzero().flatten()
            block = length // size
            if bool((places // block == sample).all()) or bool((places % size == sample).all()):
                return True
    return False


def _describe(probe: Probe, name: str) -> Blame:
    module = probe.problem.module.get_submodule(name)
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(module, name, kind)
    if getattr(module, "batch_first", None) is False:
        return Blame(
            name,
            f"{kind} has batch_first=False, so it takes the batch for the sequence",
            "build it with batch_first=True, or put the sequence first before it and back after it",
        )
    library = type(module).__module__.startswith("torch.nn")
    if name == "":
        why = "the model's own forward mixes samples, outside of its submodules"
    else:
        why = f"{kind} mixes samples" + ("" if library or not list(module.children()) else " in its own forward")
    return Blame(name, why, GENERAL)


def _batch_norm(module: nn.Module, name: str, kind: str) -> Blame:
    if module.training:
        return Blame(
            name,
            f"{kind} in training mode normalises each sample by the whole batch",
            "leave training=False, which uses the running statistics; or replace it by GroupNorm or InstanceNorm, which"
            " normalise each sample by itself",
        )
    return Blame(
        name,
        f"{kind} without running statistics normalises each sample by the whole batch in eval mode too",
        "build it with track_running_stats=True and train it, or replace it by GroupNorm",
    )


GENERAL = (
    "let every sample be treated alone (reduce over axes after the first); or, if the coupling is meant, make the whole"
    " batch one sample: wrap the model as lambda x: model(x[0])[None] and pass x[None]"
)


def _unclear(probe: Probe) -> Blame:
    del probe
    return Blame("", "the samples of a batch depend on each other", GENERAL)
