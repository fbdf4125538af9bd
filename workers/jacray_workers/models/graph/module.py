"""A graph as a module: its parameters under their names, its submodules for hooks, its steps run one by one."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError
from jacray_workers.models.graph.binding import Binding, blank
from jacray_workers.models.graph.document import Document, StateEntry
from jacray_workers.models.graph.program import Call, Program, Region, Slot, compile_graph
from jacray_workers.models.graph.sizes import check_sizes

_ORDER = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_NESTED = (Slot, list)
_MADE = ("_binding", "_programs", "_checked", "_parts", "_gauge")


class _Running(threading.local):
    """The regions that this thread is inside of, with their values."""

    def __init__(self) -> None:
        self.stack: list[tuple[Region, list[Any], GraphModule]] = []


_RUNNING = _Running()


class GraphPart(nn.Module):
    """A submodule of a graph: it holds parameters and buffers, and stands for what ran inside the original."""

    def forward(self, *given: Any) -> Any:
        """Run what stands inside; called by the graph only."""
        if not _RUNNING.stack:
            raise ModelError("model", "a part of a graph runs only inside the whole graph", type(self).__name__)
        region, values, whole = _RUNNING.stack.pop()
        if region.given is not None:
            values[region.inner] = given[0]
            whole._run(region.body, values)
        return values[region.result]


class _Forward:
    """What a `GraphModule` answers `forward` with: callable, with the original's signature."""

    def __init__(self, owner: GraphModule, signature: inspect.Signature) -> None:
        self.owner = owner
        self.__signature__ = signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner._call(args, kwargs)


class GraphModule(nn.Module):
    """A graph file's module.

    It takes what the exported module took, with any batch size, and returns the same nested lists, tuples and dicts.
    Parameters and buffers bear their original names, tied ones are one tensor, and forward hooks on submodules see the
    first tensor that went in and came out.
    """

    def __init__(self, document: Document, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._document = document
        self._lay_out(tensors)
        self._own = _widest([*self.parameters(), *self.buffers(), *(blank(e, 1) for e in document.inputs)])
        self._prepare()
        for part in self.modules():
            part.training = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the steps, which hold torch's own functions and are laid out again."""
        return {k: v for k, v in self.__dict__.items() if k not in _MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def train(self, mode: bool = True) -> GraphModule:
        """Eval mode is part of the graph.

        Raises:
            ModelError: training mode is asked for.
        """
        if mode:
            raise ModelError("training", "must be false for a graph file, which was exported in eval mode", mode)
        return self

    @property
    def forward(self) -> Any:  # type: ignore[override]
        """The call, with the signature of the exported module."""
        return _Forward(self, self._binding.signature)

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the submodules, parameters and buffers."""
        for name in self._document.modules:
            self._part(name)
        odd = sorted({entry.names[0] for entry in self._document.state} ^ {*tensors})
        if odd:
            raise ModelError("model", "must hold exactly the tensors that its graph names", odd[0])
        for entry in self._document.state:
            tensor = unstored(entry, tensors[entry.names[0]])
            for name in entry.names:
                self._place(name, tensor, entry.persistent)

    def _place(self, name: str, tensor: Tensor, persistent: bool) -> None:
        prefix, _, leaf = name.rpartition(".")
        part = self._part(prefix)
        _check_free(leaf, name)
        try:
            if isinstance(tensor, nn.Parameter):
                part.register_parameter(leaf, tensor)
            else:
                part.register_buffer(leaf, tensor, persistent=persistent)
        except KeyError:
            raise ModelError("model", "gives a parameter or buffer a name that is taken", name) from None

    def _part(self, name: str) -> nn.Module:
        part: nn.Module = self
        for step in name.split(".") if name else ():
            inner = part._modules.get(step)
            if inner is None:
                inner = GraphPart()
                _check_free(step, name)
                try:
                    part.add_module(step, inner)
                except KeyError:
                    raise ModelError("model", "gives a submodule a name that is taken", name) from None
            part = inner
        return part

    def _prepare(self) -> None:
        """Make what is not part of the module's state: lookups, and the steps for each device and precision."""
        self._binding = Binding(self._document)
        self._programs: dict[tuple[torch.device, torch.dtype], Program] = {}
        self._checked: set[tuple[int, torch.dtype]] = set()
        self._parts = dict(self.named_modules(remove_duplicate=False))
        program = self._program(torch.device("cpu"), self._own)
        self._gauge = next((n for _, n in program.states if self._state(n).dtype == self._own), None)
        for batch in (1, 2):
            self._check(batch, self._own)

    def _program(self, device: torch.device, precision: torch.dtype) -> Program:
        """The steps for this device; what the graph makes in the model's own precision is made in a wider one."""
        if (device, precision) not in self._programs:
            wider = {self._own: precision} if _ORDER.index(precision) > _ORDER.index(self._own) else {}
            wider |= {_COMPLEX[a]: _COMPLEX[b] for a, b in wider.items() if a in _COMPLEX}
            self._programs[device, precision] = compile_graph(self._document, device, wider)
        return self._programs[device, precision]

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = self._binding.leaves(args, kwargs)
        precision = _widest(leaves if self._gauge is None else [*leaves, self._state(self._gauge)], self._own)
        self._check(leaves[0].shape[0], precision)
        program = self._program(leaves[0].device, precision)
        values: list[Any] = [None] * program.size
        values[: len(leaves)] = leaves
        for place, name in program.states:
            values[place] = self._state(name)
        depth = len(_RUNNING.stack)
        try:
            self._run(program.steps, values)
        finally:
            del _RUNNING.stack[depth:]
        return _filled(program.output, values)

    def _run(self, steps: Sequence[Call | Region], values: list[Any]) -> None:
        for step in steps:
            if isinstance(step, Call):
                args = [_filled(a, values) if type(a) in _NESTED else a for a in step.args]
                kwargs = {k: _filled(v, values) for k, v in step.kwargs.items()}
                values[step.out] = step.function(*args, **kwargs)
            else:
                _RUNNING.stack.append((step, values, self))
                given = () if step.given is None else (values[step.given],)
                values[step.out] = self._parts[step.module](*given)
            for place in step.frees:
                values[place] = None

    def _state(self, name: str) -> Tensor:
        """The tensor that stands under this name now: calls may put others in the place of the module's own."""
        prefix, _, leaf = name.rpartition(".")
        part = self._parts[prefix]
        tensor: Tensor = (part._parameters if leaf in part._parameters else part._buffers)[leaf]
        return tensor

    def _check(self, batch: int, precision: torch.dtype) -> None:
        """Run the graph without data once for each batch size, so that sizes that explode are refused."""
        if (batch, precision) not in self._checked:
            program = self._program(torch.device("meta"), precision)
            blanks = [blank(entry, batch, precision) for entry in self._document.inputs]
            states = {place: torch.empty_like(self._state(name), device="meta") for place, name in program.states}
            check_sizes(program, blanks, states, batch)
            self._checked.add((batch, precision))


def _check_free(step: str, name: str) -> None:
    """A submodule or tensor must not hide what the module itself is made of."""
    if hasattr(GraphModule, step) or step in (*_MADE, "_document", "_own", "training"):
        raise ModelError("model", "gives a submodule, parameter or buffer a name that is taken", name)


def unstored(entry: StateEntry, tensor: Tensor) -> Tensor:
    """A file's tensor as the parameter or buffer that it stands for.

    Raises:
        ModelError: a complex tensor is not stored as pairs of real numbers.
    """
    if entry.pairs:
        if tensor.dim() == 0 or tensor.shape[-1] != 2 or tensor.dtype not in _COMPLEX:
            raise ModelError("model", "must store a complex tensor as pairs of real numbers", entry.names[0])
        tensor = torch.view_as_complex(tensor)
    if entry.kind == "buffer":
        return tensor
    return nn.Parameter(tensor, requires_grad=entry.trains and (tensor.is_floating_point() or tensor.is_complex()))


def _widest(tensors: Sequence[Tensor], least: torch.dtype | None = None) -> torch.dtype:
    """The widest real precision among these, at least the one given."""
    found = [t.dtype for t in tensors if t.dtype in _ORDER]
    return max([*found, *([least] if least else [])], key=_ORDER.index, default=torch.float32)


def _filled(template: Any, values: list[Any]) -> Any:
    """The template with values in the place of slots."""
    if type(template) is Slot:
        return values[template.index]
    if isinstance(template, list | tuple):
        return type(template)(_filled(part, values) for part in template)
    if isinstance(template, dict):
        return {key: _filled(part, values) for key, part in template.items()}
    return template
