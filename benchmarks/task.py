"""A case as the sides of a comparison meet it: the model, what is differentiated, and what comes out."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.nets import Case

Arrays = dict[str, Tensor]


class CannotError(Exception):
    """A side cannot do a piece of work; the text says why, as the table shows it."""


class Ready(NamedTuple):
    """A side that is ready to be timed.

    Attributes:
        call: does the work once and returns what the side gives its users.
        read: that as arrays by name, in the layout of `Task.layout`; never timed.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Arrays]


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        name: as the table shows it.
        make: gets ready for a task; raises `CannotError` where the side cannot do it.
    """

    name: str
    make: Callable[[Task], Ready]


@dataclass(frozen=True)
class Task:
    """A case with its tensors.

    Attributes:
        case: what it is.
        model: the module in eval mode; a side's own, so that hooks of one do not slow another.
        x: what the module takes, batch first.
    """

    case: Case
    model: nn.Module
    x: Tensor

    @property
    def by_parameters(self) -> bool:
        """Whether the derivatives are with respect to parameters."""
        return not isinstance(self.case.request.get("wrt", "inputs"), dict) and self.names != ()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that are differentiated; empty for inputs and hidden points."""
        wrt = self.case.request.get("wrt", "inputs")
        if wrt == "inputs" or isinstance(wrt, dict):
            return ()
        pattern = "*" if wrt == "params" else wrt
        return tuple(name for name, _ in self.model.named_parameters() if fnmatch.fnmatchcase(name, pattern))

    @property
    def point(self) -> Tensor:
        """What is differentiated where that is no parameter: the inputs, or the embeddings `(B, *point)`."""
        if isinstance(self.case.request.get("wrt"), dict):
            return self.model.embed(self.x).detach()
        return self.x

    @property
    def tail(self) -> Callable[[Tensor], Tensor]:
        """From the point to the outputs, batch first."""
        return self.model.after if isinstance(self.case.request.get("wrt"), dict) else self.model

    @property
    def out_shape(self) -> tuple[int, ...]:
        """One sample's output."""
        with torch.no_grad():
            return tuple(self.model(self.x[:1]).shape[1:])

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are differentiated, by name."""
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self.names}

    def layout(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the answer: `(B, *out, *point)`, `(B, *out, *param)`, or the NTK's."""
        batch, out = self.x.shape[0], self.out_shape
        if self.case.returns == "ntk":
            return {"ntk": (batch, batch, *out, *out)}
        if not self.by_parameters:
            return {"": (batch, *out, *self.point.shape[1:])}
        return {name: (batch, *out, *p.shape) for name, p in self.parameters().items()}

    def dense_bytes(self) -> int:
        """Bytes of the dense Jacobian in the model's precision, also where the answer is smaller."""
        rows = self.x.shape[0]
        for n in self.out_shape:
            rows *= n
        columns = sum(p.numel() for p in self.parameters().values()) if self.by_parameters else self.point[0].numel()
        return rows * columns * next(self._floats()).element_size()

    def _floats(self) -> Any:
        yield from self.model.parameters()
        yield self.x

    def own_copy(self) -> Task:
        """The same task around a copy of the model and of the batch, with gradients of parameters as they were made."""
        return Task(self.case, copy.deepcopy(self.model), self.x.clone())


def make_task(case: Case, seed: int = 0, device: str = "cpu") -> Task:
    """Build a case's model and batch from a seed."""
    torch.manual_seed(seed)
    model, x = case.make()
    return Task(case, model.eval().to(device), x.to(device))


def split_flat(flat: Tensor, task: Task) -> Arrays:
    """`(B, *out, P)` with the parameters one after another, as arrays by name."""
    found, at = {}, 0
    for name, p in task.parameters().items():
        found[name] = flat[..., at : at + p.numel()].unflatten(-1, p.shape)
        at += p.numel()
    return found
