"""Run a graph on tensors without data, so that sizes that explode are refused before anything is allocated."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.graph.program import Call, Program, Region, Slot
from jacray_workers.planning.explain import size

MAX_NUMBERS = 2**36
"""The most numbers that one value may hold, views included: reading more would take for ever."""
MAX_WHOLE = 2**40


def check_sizes(program: Program, inputs: Sequence[Tensor], states: Mapping[int, Tensor], batch: int) -> None:
    """Refuse a graph whose values do not fit into free memory for this batch size.

    Args:
        program: the steps, laid out for the meta device.
        inputs: blank inputs `(batch, ...)` on the meta device.
        states: blank parameters and buffers by their places.
        batch: for the message.

    Raises:
        ModelError: a value is too large, all live values are, or an operator refuses its arguments.
    """
    values: list[Any] = [None] * program.size
    values[: len(inputs)] = inputs
    for place, tensor in states.items():
        values[place] = tensor
    live = _Live(batch)
    with _unseen():
        for step in _flat(program.steps):
            if isinstance(step, Call):
                try:
                    values[step.out] = step.function(
                        *(_filled(a, values) for a in step.args),
                        **{k: _filled(v, values) for k, v in step.kwargs.items()},
                    )
                except Exception as error:  # noqa: BLE001 - operators raise whatever their checks raise
                    what = f"cannot run {_name(step)} on a batch of {batch}: {error}"
                    raise ModelError("model", what, Plain("a graph file")) from None
                live.add(step.out, values[step.out], _name(step))
            elif isinstance(step, tuple):
                values[step[1]] = values[step[0]]
            for place in step.frees if isinstance(step, Call) else ():
                values[place] = None
                live.drop(place)


class _Live:
    """The bytes of all values that are still to be read; views of one storage count once."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.free = psutil.virtual_memory().available
        self.users: Counter[int] = Counter()
        self.bytes: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}

    def add(self, place: int, value: Any, name: str) -> None:
        if isinstance(value, int):
            if abs(value) > MAX_WHOLE:
                raise self._refused(f"makes the size {value:,} in {name}")
            return
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(tensor, Tensor):
                raise ModelError("model", f"gets no tensor from {name}", type(tensor).__name__)
            if tensor.numel() > MAX_NUMBERS:
                raise self._refused(f"makes a tensor of {tensor.numel():,} numbers in {name}")
            storage = tensor.untyped_storage()
            key = storage._cdata
            self.users[key] += 1
            self.bytes[key] = storage.nbytes()
            self.held.setdefault(place, []).append(key)
        total = sum(self.bytes.values()) if self.bytes else 0
        if total > self.free:
            raise self._refused(f"needs {size(total)} at once at {name}, where {size(self.free)} are free")

    def drop(self, place: int) -> None:
        for key in self.held.pop(place, ()):
            self.users[key] -= 1
            if self.users[key] == 0:
                del self.users[key], self.bytes[key]

    def _refused(self, what: str) -> ModelError:
        return ModelError("model", f"has a graph that {what} for a batch of {self.batch}", Plain("a graph file"))


def _flat(steps: Sequence[Call | Region]) -> Iterator[Call | tuple[int, int]]:
    """The calls in order; a pair of places where a value passes a module's border."""
    for step in steps:
        if isinstance(step, Call):
            yield step
            continue
        if step.given is not None:
            yield step.given, step.inner
            yield from _flat(step.body)
        yield step.result, step.out


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """No gradient, and no mode that watches or rewrites calls, sees what runs inside."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), dispatch._disable_current_modes():
        yield


def _name(step: Call) -> str:
    return str(getattr(step.function, "__name__", step.function))


def _filled(template: Any, values: list[Any]) -> Any:
    if type(template) is Slot:
        return values[template.index]
    return [_filled(part, values) for part in template] if isinstance(template, list) else template
