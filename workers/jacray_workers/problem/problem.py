"""A differentiation problem: one function of flat lists of tensors, made from any model, inputs and request.

Every kernel sees the same thing: leaves to differentiate with respect to, and one matrix of outputs, a row per
sample. Pytrees, names, hidden points, casts and output choices end here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError
from jacray_workers.problem.branches import Branches
from jacray_workers.problem.points import hidden_points
from jacray_workers.problem.session import seed_generators, session
from jacray_workers.problem.state import kept, modules_of
from jacray_workers.problem.trees import Arguments
from jacray_workers.request import ModulePoint

Side = Literal["input", "param", "module"]
# The types that have derivatives, the widest first.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CallableModule(nn.Module):
    """A plain function of tensors as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        functools.update_wrapper(self, function, assigned=("__doc__",), updated=())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


def as_module(model: Any) -> nn.Module:
    """The module to differentiate: compiled and data-parallel wrappers are taken off, functions are wrapped.

    Raises:
        ModelError: the model is not callable, or has parameters that were never initialised.
    """
    while isinstance(model, nn.Module) and (inner := _wrapped(model)) is not None:
        model = inner
    if not callable(model):
        raise ModelError("model", "must be an nn.Module, a callable of tensors or a model spec", type(model).__name__)
    module = model if isinstance(model, nn.Module) else CallableModule(model)
    kind = nn.parameter.UninitializedParameter
    lazy: list[str] = []
    if any(isinstance(p, kind) for part in modules_of(module) for p in part._parameters.values()):
        lazy = [name for name, p in module.named_parameters() if isinstance(p, kind)]
    if lazy:
        raise ModelError("model", "must have initialised parameters", lazy[0], "call the model once on a batch first")
    return module


@contextlib.contextmanager
def _both(
    outer: contextlib.AbstractContextManager[None], inner: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield


def own_tensor(module: nn.Module, name: str) -> Tensor:
    """A module's parameter or buffer by its name."""
    *path, last = name.split(".")
    for step in path:
        module = module._modules[step]  # type: ignore[assignment]
    found = module._parameters.get(last)
    return module._buffers[last] if found is None else found  # type: ignore[return-value]


@contextlib.contextmanager
def _in_place(module: nn.Module, swapped: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the places of a module's own, by name; a tied one in each place where it stands.

    `torch.func.functional_call` would do so by names: where one module is registered twice it then restores under the
    second name what it had put there under the first, and the module keeps a stranger's tensors.
    """
    put = {id(own_tensor(module, name)): tensor for name, tensor in swapped.items()}
    saved: list[tuple[Any, str, Any]] = []
    try:
        for part in modules_of(module):
            for table in cast("tuple[dict[str, Any], ...]", (part._parameters, part._buffers)):
                places = [(table, name, own) for name, own in table.items() if id(own) in put]
                saved += places
                for _, name, own in places:
                    table[name] = put[id(own)]
        yield
    finally:
        for table, name, own in reversed(saved):
            table[name] = own


def _wrapped(model: nn.Module) -> Any:
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return inner


@dataclass(frozen=True)
class Leaf:
    """One tensor to differentiate with respect to.

    Attributes:
        key: its name in results: `inputs`, `inputs.NAME`, a parameter's name, or `MODULE:side`.
        side: where it stands.
        shape: of one sample, or of the whole parameter.
        dtype: the precision it is differentiated in.
        index: which input leaf, for `input`.
        name: the parameter's or the module's own name, for `param` and `module`.
    """

    key: str
    side: Side
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int = -1
    name: str = ""

    @property
    def point(self) -> ModulePoint:
        """The hidden point of a `module` leaf."""
        return ModulePoint(module=self.name, side="input" if self.key.endswith(":input") else "output")

    @property
    def size(self) -> int:
        """How many numbers one sample's leaf, or the parameter, holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Out:
    """One output tensor, or the chosen entries of one.

    Attributes:
        key: its name in results; the empty string for a bare tensor.
        index: which leaf of the model's output.
        shape: of one sample, after the choice of entries.
        pick: flat indices into one sample's output, consecutive ones as a range, or None for all of it.
        rows: where its entries stand among the rows of the Jacobian.
        dtype: the precision the model returns.
    """

    key: str
    index: int
    shape: tuple[int, ...]
    pick: tuple[int, ...] | range | None
    rows: range
    dtype: torch.dtype


@dataclass(frozen=True)
class Problem:
    """What kernels differentiate: `forward(values, batch) -> (B, rows)`.

    Attributes:
        module: the model; never changed outside of `session`.
        call: how input leaves become arguments.
        leaves: what to differentiate with respect to, in the order of `values`.
        outs: the outputs, in the order of the rows.
        rows: how many output numbers one sample has.
        tensors: parameters and buffers to use in place of the module's own (casts, another device), or empty.
        device, dtype: where the arithmetic happens, and the rows' precision.
        training, tf32, seed: the state to run in.
        wrt_tree, out_tree: nested containers whose leaves are indices into `leaves` and `outs` (None where there
            is nothing to differentiate): the structure of results.
        point: the hidden point that stands for the output, or None.
        cast: the precision float inputs are cast to, or None to take them as they come.
        random: the model draws random numbers, so every pass starts from the same seed.
        writes: the model writes into what it is given, so every pass is given copies.
        differentiates: the model takes derivatives itself, so gradients are on in every pass.
        stateful: the model keeps something from one call to the next, so every pass starts from what the job found.
        written: the parameters and buffers that it writes into, so every pass is given copies of them.
        branches: the model calls `torch.cond`, which runs as the branch that it takes.
        compared: the model reads values of its masks or indices, which `vmap` cannot follow; a batch is only passed to
            a method once its samples were seen to give what they give alone.
        workspace: bytes that a method may hold at a time beside its results, where it has the choice.
        notes: what a reader of the plan should know.
        memo: what kernels found out about the model's make-up and may use again in later calls. It outlives changes of
            the parameters' values, so nothing computed from them belongs here, and no reference to the module.
    """

    module: nn.Module
    call: Arguments
    leaves: tuple[Leaf, ...]
    outs: tuple[Out, ...]
    rows: int
    tensors: dict[str, Tensor] = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    training: bool
    tf32: bool
    seed: int
    wrt_tree: Any
    out_tree: Any
    point: ModulePoint | None
    cast: torch.dtype | None = None
    random: bool = False
    writes: bool = False
    differentiates: bool = False
    stateful: bool = False
    written: tuple[str, ...] = ()
    branches: bool = False
    compared: bool = False
    workspace: int = 1 << 28
    notes: tuple[str, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def session(self) -> contextlib.AbstractContextManager[None]:
        """The state to compute in; the caller's module is as it was afterwards."""
        seed = self.seed if self.random else None
        held = session(self.module, training=self.training, tf32=self.tf32, seed=seed, stateful=self.stateful)
        return _both(held, Branches()) if self.branches else held

    def around(self, module: nn.Module, tensors: dict[str, Tensor]) -> Problem:
        """The same around another module: what `dataclasses.replace` gives, at a tenth of its cost."""
        made = object.__new__(Problem)
        made.__dict__.update(self.__dict__, module=module, tensors=tensors)
        return made

    def values(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The leaves' values for this batch: `(B, *leaf)` for inputs and hidden points, `(*param)` for parameters."""
        hidden = self._hidden(batch) if any(leaf.side == "module" for leaf in self.leaves) else {}
        found: list[Tensor] = []
        for leaf in self.leaves:
            if leaf.side == "input":
                found.append(batch[leaf.index].detach())
            elif leaf.side == "param":
                used = self.tensors.get(leaf.name)
                found.append((own_tensor(self.module, leaf.name) if used is None else used).detach())
            else:
                found.append(hidden[leaf.key])
        return found

    def forward(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        """The chosen outputs as a matrix `(B, rows)`, with the leaves at these values.

        Works on a whole batch and, under `vmap`, on a batch of one.
        """
        y = self.call_model(values, batch)
        return self.flatten(y, batch[0].shape[0])

    def call_model(self, values: Sequence[Tensor], batch: Sequence[Tensor]) -> Any:
        """What the model returns, or the captured hidden tensor where `outputs` names a module."""
        inputs, swapped, injected = list(batch), dict(self.tensors), dict[ModulePoint, Tensor]()
        for leaf, value in zip(self.leaves, values, strict=True):
            if leaf.side == "input":
                inputs[leaf.index] = value
            elif leaf.side == "param":
                swapped[leaf.name] = value
            else:
                injected[leaf.point] = value
        if self.random:
            seed_generators(self.seed)
        if self.writes:
            inputs = [leaf.clone() for leaf in inputs]
            injected = {point: value.clone() for point, value in injected.items()}
        args, kwargs = self.call.bind(inputs)
        with hidden_points(self.module, injected, self.point) as captured:
            y = self._call(swapped, args, kwargs)
        return captured[self.point.key] if self.point is not None else y

    def flatten(self, y: Any, size: int) -> Tensor:
        """The model's return value as a matrix `(size, rows)`."""
        found = pytree.tree_leaves(y)
        parts = []
        for out in self.outs:
            part = found[out.index].reshape(size, -1)
            if isinstance(out.pick, range):
                part = part[:, out.pick.start : out.pick.stop]
            elif out.pick is not None:
                part = part[:, list(out.pick)]
            parts.append(part.to(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def split(self, rows: Tensor, axis: int = 1) -> list[Tensor]:
        """One tensor per output from a tensor whose axis `axis` runs over the rows."""
        before, after = rows.shape[:axis], rows.shape[axis + 1 :]
        return [
            rows.narrow(axis, out.rows.start, len(out.rows)).reshape(*before, *out.shape, *after) for out in self.outs
        ]

    def _call(self, swapped: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.differentiates and not torch.is_grad_enabled():
            with torch.enable_grad():
                y = self._call(swapped, args, kwargs)
            return pytree.tree_map_only(Tensor, Tensor.detach, y)
        if self.written:
            swapped = {**swapped, **{name: self._copy(name, swapped) for name in self.written}}
        if self.stateful:
            with kept(self.module, deep=True):
                return self._run(swapped, args, kwargs)
        return self._run(swapped, args, kwargs)

    def _copy(self, name: str, swapped: dict[str, Tensor]) -> Tensor:
        """A tensor of the model that it may write into."""
        own: Tensor = swapped[name] if name in swapped else operator.attrgetter(name)(self.module).detach()
        return own.clone()

    def _run(self, swapped: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if swapped:
            with _in_place(self.module, swapped):
                return self.module(*args, **kwargs)
        return self.module(*args, **kwargs)

    def _hidden(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """The values that the hidden leaves have for this batch."""
        found = {}
        for leaf in self.leaves:
            if leaf.side == "module":
                args, kwargs = self.call.bind([part.clone() for part in batch] if self.writes else batch)
                with torch.no_grad(), hidden_points(self.module, {}, leaf.point) as captured:
                    self._call(self.tensors, args, kwargs)
                found[leaf.key] = captured[leaf.key].detach()
        return found
