"""Whether a model turns the values of its inputs into Python values, on which its path or its shapes then depend.

Such a model may treat a batch otherwise than a sample: a threshold that one sample crosses, a count of what a mask
picked. No probe of a few samples can rule that out, so it is watched for. Where only integers and booleans beside what
is differentiated decide, as a padding mask does, a batch and its samples seldom part: then chunks can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError
from jacray_workers.planning.watching import Watcher
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.state import written_by
from jacray_workers.trust.reference import all_tensors

# What leaves torch with the values of a tensor, and so is no operator. Not `__repr__`: it is there to be printed.
_LEAVES = frozenset(("numpy", "__array__", "tolist", "__dlpack__", "data_ptr"))
# Functions that read values only to check them, where the second argument is given.
_CHECKS = frozenset(("one_hot",))
_TAGS = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


Read = Literal["nothing", "marks", "data"]


def what_is_read(problem: Problem, batch: Sequence[Tensor]) -> tuple[Read, bool]:
    """Which values that depend on its inputs the model reads, and whether it reads any of its parameters or buffers.

    Called inside `problem.session()`. `marks` are integers and booleans beside what is differentiated (a mask, token
    ids) and what is made from them and from parameters alone; `data` is anything else.
    """
    values = problem.values(batch)
    given = [value for leaf, value in zip(problem.leaves, values, strict=True) if leaf.side != "param"]
    loose = [*given, *(leaf for leaf in batch if leaf.is_floating_point() or leaf.is_complex())]
    seen = _Data([*batch, *given], loose)
    swapped = [value for leaf, value in zip(problem.leaves, values, strict=True) if leaf.side == "param"]
    own = _Data([*all_tensors(problem).values(), *swapped], ())
    # What does not run under the looks does not run elsewhere either, and is told there.
    bearing = contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, ModelError)
    with bearing, torch.no_grad(), _Calls(own), _Operators(own), _Calls(seen), _Operators(seen):
        problem.forward(values, batch)
    return seen.read, own.read != "nothing"


class _Data:
    """The tensors that depend on the inputs, by their memory; those of them that are more than marks; what was read."""

    def __init__(self, data: Sequence[Tensor], loose: Sequence[Tensor]) -> None:
        self.read: Read = "nothing"
        self.paused = 0
        self._known: dict[int, Tensor] = {}
        self._loose: set[int] = set()
        self.add(data, loose=False)
        self.add(loose, loose=True)

    def add(self, found: Any, *, loose: bool) -> None:
        """Take every tensor in a nest of containers, and keep it: memory is used again once its tensor is gone."""
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._known.setdefault(leaf.untyped_storage()._cdata, leaf)
                if loose:
                    self._loose.add(leaf.untyped_storage()._cdata)

    def holds(self, value: Any) -> Read:
        """What the tensors in a nest of containers depend on."""
        leaves = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        places = [leaf.untyped_storage()._cdata for leaf in leaves if leaf.layout == torch.strided]
        if not any(place in self._known for place in places):
            return "nothing"
        return "data" if any(place in self._loose for place in places) else "marks"

    def note(self, value: Any) -> None:
        """Something of these is turned into a Python value or into a shape."""
        found = "nothing" if self.paused else self.holds(value)
        if found != "nothing" and self.read != "data":
            self.read = found


class _Operators(Watcher):
    """Follows the data through operators, and sees those whose result torch itself says depends on values."""

    def __init__(self, data: _Data) -> None:
        super().__init__()
        self._data = data

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs)
        if isinstance(func, torch._ops.HigherOrderOperator):
            # The condition of a branch or of a loop, whatever the operator calls it.
            self._data.note(given)
        elif _TAGS.intersection(func.tags):
            self._data.note(_decides(func, args))
        held = self._data.holds(given)
        if held != "nothing":
            self._data.add(list(written_by(func, args, kwargs or {})), loose=held == "data")
            result = func(*args, **(kwargs or {}))
            self._data.add(result, loose=held == "data")
            return result
        return func(*args, **(kwargs or {}))


def _decides(func: Any, args: Any) -> Any:
    """The arguments whose values decide the result's shape or value."""
    if func._overloadpacket is torch.ops.aten.index:
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return args[1] if func._overloadpacket is torch.ops.aten.masked_select else args


class _Calls(TorchFunctionMode):
    """Sees values leave torch without an operator."""

    def __init__(self, data: _Data) -> None:
        super().__init__()
        self._data = data

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES:
            self._data.note(args)
        if name not in _CHECKS or len(args) + len(kwargs or {}) < 2:
            return func(*args, **(kwargs or {}))
        self._data.paused += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._data.paused -= 1
