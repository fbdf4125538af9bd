"""Follow parameters through a model's calls, and tap each call where one meets the batch.

A `TorchFunctionMode` sees every call of torch that the model makes, in eager and in exported modules. Parameters are
known by identity, so reused, shared and directly used ones are met wherever they are used. A call whose result holds
no batch (a transpose, a weight norm, a sum of low-rank factors) is a *derivation*: its result is followed like a
parameter. A call whose result holds the batch is a *tap*: it runs with the parameter detached, its other arguments are
kept, and so is the place in the autograd graph where the cotangent of its result will arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from jacray_workers.errors import MethodError
from jacray_workers.kernels.common import handed
from jacray_workers.problem.problem import Problem, own_tensor
from jacray_workers.sharing import in_forward_mode
from jacray_workers.taps.sites import Path, Site, defeat

Func = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_DUNDER_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "pow", "floordiv", "mod")}


_DIFFERENTIATES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter, or a tensor derived from parameters, as a tap's argument found it.

    Attributes:
        tensor: the tensor, with its autograd graph back to the parameters.
        edge: its place in that graph when it was used.
        version: of its memory when it was used.
    """

    tensor: Tensor
    edge: GradientEdge
    version: int


@dataclass(frozen=True, eq=False)
class Target:
    """Where the cotangent of a tap's result arrives.

    Attributes:
        edge: the place in the autograd graph.
        shape: of the tensor there.
        dtype, device: of the tensor there.
        window: size, stride and offset of the result inside that tensor, where it is a view that was written to.
    """

    edge: GradientEdge
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    window: tuple[tuple[int, ...], tuple[int, ...], int] | None = None


@dataclass(frozen=True, eq=False)
class Tap:
    """One call where parameters meet the batch.

    Attributes:
        site: what the probe knows about the call.
        args, kwargs: its arguments; parameters are detached, an argument that the call wrote to is a copy from before.
        sources: the parameter-like arguments by path.
        target: where the cotangent of the result arrives; None where the result carries no gradient.
        shape: of the result.
        size: the batch size.
        used: the other tensors as they were kept, with their versions.
    """

    site: Site
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: dict[Path, Source]
    target: Target
    shape: tuple[int, ...]
    size: int
    used: list[tuple[Tensor, int]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Entry:
    """What a pass of the model starts from.

    Attributes:
        values: what `Problem.forward` is given for each leaf.
        batch: private copies of the input leaves: the model may write into them, and taps keep them.
        leaves: the tensor that each leaf's derivative is taken at; all require gradients.
        known: which parameter leaf stands for a tensor, by the tensor's `id`.
    """

    values: list[Tensor]
    batch: list[Tensor]
    leaves: list[Tensor]
    known: dict[int, Tensor]


def enter(problem: Problem, batch: Sequence[Tensor], shift: torch.Generator | None = None) -> Entry:
    """Fresh leaves for one pass.

    Args:
        problem: whose leaves.
        batch: the placed input leaves.
        shift: moves parameters a little off their values, so that none is constant: for the probe.
    """
    leaves: list[Tensor] = []
    known: dict[int, Tensor] = {}
    hidden = any(leaf.side == "module" for leaf in problem.leaves)
    before = problem.values([t.clone() for t in batch] if hidden else batch)
    for leaf, value in zip(problem.leaves, before, strict=True):
        start = value if shift is None or leaf.side != "param" else shifted(value, shift)
        tensor = start.detach().requires_grad_()
        leaves.append(tensor)
        if leaf.side == "param":
            known[id(tensor)] = tensor
            known[id(own_tensor(problem.module, leaf.name))] = tensor
    # Taps keep what they are given, and so may factors: then it must not be the caller's memory.
    tapped = any(leaf.side == "param" for leaf in problem.leaves)
    pairs = zip(problem.leaves, leaves, strict=True)
    values = [t if leaf.side == "param" else t.clone() for leaf, t in pairs] if tapped else handed(problem, leaves)
    # An input that is a leaf is replaced by its value: no second copy of it is made.
    taken = {leaf.index: value for leaf, value in zip(problem.leaves, values, strict=True) if leaf.side == "input"}
    return Entry(values, [taken[i] if i in taken else t.clone() for i, t in enumerate(batch)], leaves, known)


def shifted(t: Tensor, random: torch.Generator) -> Tensor:
    """The tensor with every number moved a little, by a part of itself and a part of their common size."""
    wide = t.double()
    noise = torch.rand((2, *t.shape), generator=random, dtype=torch.float64).to(t.device) - 0.5
    scale = wide.square().mean().sqrt() if t.numel() else wide.sum()
    moved = wide * (1 + 0.1 * noise[0]) + (0.02 * scale + 0.001) * noise[1]
    return moved.to(t.dtype)


def walk(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor among a call's arguments, also inside lists and tuples, with its path."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in items:
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, list | tuple):
            for path, tensor in walk(value, {}):
                yield (key, *path), tensor


def swap(args: Sequence[Any], kwargs: Kwargs, by: Mapping[Path, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with what stands at some paths replaced."""
    if not by:
        return tuple(args), dict(kwargs)
    heads: dict[int | str, dict[Path, Any]] = {}
    for path, value in by.items():
        heads.setdefault(path[0], {})[path[1:]] = value
    new_args = tuple(_swapped(a, heads.get(i)) for i, a in enumerate(args))
    return new_args, {name: _swapped(a, heads.get(name)) for name, a in kwargs.items()}


def _swapped(value: Any, by: dict[Path, Any] | None) -> Any:
    if by is None:
        return value
    if () in by:
        return by[()]
    inner, _ = swap(value, {}, by)
    return type(value)(inner) if type(value) in (list, tuple) else inner


def writes(func: Callable[..., Any]) -> bool:
    """Whether a call writes to its first argument."""
    packet = getattr(func, "overloadpacket", None)
    name = str(getattr(packet or func, "__name__", ""))
    if name.startswith("__"):
        return name == "__setitem__" or name in _DUNDER_WRITES
    return name.endswith("_")


def outputs(func: Callable[..., Any], args: Sequence[Any], result: Any) -> list[Tensor]:
    """The tensors that a call made; for a call that returns nothing, the one it wrote to."""
    if isinstance(result, Tensor):
        return [result]
    if result is None and args and isinstance(args[0], Tensor) and writes(func):
        return [args[0]]
    return [t for _, t in walk(result, {})] if isinstance(result, list | tuple) else []


def _transformed() -> bool:
    """Whether the call stands inside `torch.func`'s transforms or forward-mode differentiation of the model's own."""
    inside: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or in_forward_mode()


class Watch(TorchFunctionMode):
    """Sees every call; hands those that touch a parameter to `touch`.

    Args:
        leaves: what stands for each parameter, by the parameter's `id`. Also holds the module's own parameters, so that
            a reference that escaped the swap of parameters is still recognised.
    """

    def __init__(self, leaves: Mapping[int, Tensor]) -> None:
        # The rules know what a tap is, so they cannot be imported before it.
        from jacray_workers.rules.rewrite import rewrites

        super().__init__()
        self.known = dict(leaves)
        self.rewrites = rewrites()
        self.rewrote = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of every function."""
        del types
        kwargs = kwargs or {}
        if self.known and func in _DIFFERENTIATES:
            raise defeat("the model differentiates within its forward pass, where parameters' uses cannot be seen")
        rewrite = self.rewrites.get(func)
        if rewrite is not None and torch.is_grad_enabled():
            made = rewrite(func, args, kwargs, self)
            self.rewrote = True
            if made is not NotImplemented:
                return made
        touched = {path: self.known[id(t)] for path, t in walk(args, kwargs) if id(t) in self.known}
        if touched and _transformed():
            raise defeat("the model uses its parameters inside a function transform")
        return self.touch(func, args, kwargs, touched) if touched else func(*args, **kwargs)

    def touch(self, func: Func, args: Args, kwargs: Kwargs, touched: dict[Path, Tensor]) -> Any:
        """A call with parameter-like arguments."""
        args, kwargs = swap(args, kwargs, touched)
        return func(*args, **kwargs)

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Follow these results as parameters are followed."""
        for t in tensors:
            if t.requires_grad:
                self.known[id(t)] = t


class Recorder(Watch):
    """Taps calls, as the probe's sites say.

    Args:
        leaves: see `Watch`.
        sites: what the probe learned of each call that touches a parameter, in order.
        size: the batch size.
        copies: keep copies of what taps use, for models that overwrite it later.
    """

    def __init__(self, leaves: Mapping[int, Tensor], sites: Sequence[Site], size: int, copies: bool) -> None:
        super().__init__(leaves)
        self.sites, self.size, self.copies = sites, size, copies
        self.place = 0
        self.taps: list[Tap] = []
        # Stand-ins for parameters that begin the graph.
        self.started: list[Tensor] = []
        # Parameters touched where no gradient was recorded; the reentrant checkpoint hides real uses there.
        self.blind: list[Tensor] = []

    def touch(self, func: Func, args: Args, kwargs: Kwargs, touched: dict[Path, Tensor]) -> Any:
        """Run the call, and record it where parameters meet the batch."""
        if not torch.is_grad_enabled():
            self.blind.extend(touched.values())
            args, kwargs = swap(args, kwargs, touched)
            return func(*args, **kwargs)
        site = self._next(func)
        if site.kind == "tap":
            return self._tap(site, args, kwargs, touched)
        args, kwargs = swap(args, kwargs, touched)
        result = func(*args, **kwargs)
        if site.kind == "derive":
            self.follow(outputs(func, args, result))
        return result

    def _next(self, func: Callable[..., Any]) -> Site:
        if self.place >= len(self.sites) or self.sites[self.place].func != func:
            raise another_path()
        self.place += 1
        return self.sites[self.place - 1]

    def _tap(self, site: Site, args: Args, kwargs: Kwargs, touched: dict[Path, Tensor]) -> Any:
        func = site.func
        others = {path: t for path, t in walk(args, kwargs) if path not in touched}
        # The first parameter that data without a graph meets starts the graph itself.
        starts = not any(t.requires_grad for t in others.values())
        sources = {path: Source(t, get_gradient_edge(t), t._version) for path, t in touched.items()}
        detached = {path: t.detach().requires_grad_(starts) for path, t in touched.items()}
        self.started.extend(detached.values() if starts else ())
        written: set[Path] = {(0,)} if writes(func) else set()
        before = {path: t.detach().clone() for path, t in others.items() if self.copies or path in written}
        kept = {path: t.detach() for path, t in touched.items()} | before
        used = [(t, t._version) for path, t in others.items() if path not in before]
        run_args, run_kwargs = swap(args, kwargs, detached)
        result = func(*run_args, **run_kwargs)
        found = outputs(func, run_args, result)
        if len(found) != 1:
            raise defeat(f"{name_of(func)} mixes a parameter with the batch and returns {len(found)} tensors")
        out = found[0]
        if not out.requires_grad:
            return result
        kept_args, kept_kwargs = swap(args, kwargs, kept)
        target = _target(func, out)
        self.taps.append(Tap(site, kept_args, kept_kwargs, sources, target, tuple(out.shape), self.size, used))
        return result


def _target(func: Callable[..., Any], out: Tensor) -> Target:
    """Where the cotangent of `out` arrives: for a view just written to, at the tensor that it is a view of.

    A write to a view gives the whole tensor a new place in the graph; the view's own place is on no path from there.
    """
    base = out._base if writes(func) and out._is_view() else None
    if base is None:
        return Target(get_gradient_edge(out), tuple(out.shape), out.dtype, out.device)
    if not base.is_contiguous():
        raise defeat(f"{name_of(func)} writes to a view of a tensor with a transposed layout")
    window = (tuple(out.shape), tuple(out.stride()), int(out.storage_offset() - base.storage_offset()))
    return Target(get_gradient_edge(base), tuple(base.shape), base.dtype, base.device, window)


class AnotherPath(MethodError):  # noqa: N818  # named for what happened, as a MethodError
    """The model made other calls than in an earlier pass."""


def another_path() -> AnotherPath:
    """The error for a pass that differs from the probe's."""
    rule = "the model calls other functions for this batch than for its first samples"
    return AnotherPath("method", rule, "layerwise")


def name_of(func: Callable[..., Any]) -> str:
    """A function's name for messages."""
    return str(getattr(func, "__name__", func))
