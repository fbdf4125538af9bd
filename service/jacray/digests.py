"""What decides a job's numbers, as digests: a job is the same job when all of them are equal.

Made of names, source code, structure and bytes, not of pickles, which differ from process to process.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import cloudpickle
import torch
from jacray_workers.request import Request
from torch import Tensor, nn

from jacray.plans import PINNED
from jacray.receipt import library_versions

# What `nn.Module` keeps for itself; parameters and buffers are hashed by their names.
_MODULES_OWN = frozenset(vars(nn.Module()))
_LIBRARIES = ("torch.", "builtins.")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type(Ellipsis))
_NAMED = (types.ModuleType, types.BuiltinFunctionType, type)


def digests(model: Any, inputs: Any, request: Request, threads: int) -> dict[str, str]:
    """The digests of a job.

    Args:
        model: an `nn.Module` or a callable.
        inputs: a tensor or a pytree of tensors.
        request: what to compute, with `weights` and `vectors` as they will be used.
        threads: torch threads of each worker, which decide the order of some sums.

    Returns:
        A digest for each of model, inputs and request; what may be left to the plan, and short facts, as they are.
    """
    versions = library_versions()
    asked = {name: getattr(request, name) for name in type(request).model_fields if name not in PINNED}
    return {
        "model": digest(model),
        "inputs": digest(inputs),
        "request": digest(asked),
        **{name: str(getattr(request, name)) for name in PINNED},
        "threads": str(threads),
        "versions": f"jacray {versions['jacray']}, torch {versions['torch']}",
    }


def digest(value: Any) -> str:
    """A sha256 of a module, a function, a tensor, a plain value, or a structure of these."""
    walk = _Walk()
    walk.take(value)
    return walk.found.hexdigest()


class _Walk:
    """Visits everything that a value is made of, in an order that does not depend on the process."""

    def __init__(self) -> None:
        self.found = hashlib.sha256()
        self._places: dict[int, int] = {}
        self._alive: list[Any] = []

    def take(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._text(f"{type(value).__name__}:{value!r}")
        elif isinstance(value, _NAMED):
            self._text(getattr(value, "__qualname__", value.__name__))
        elif id(value) in self._places:  # met before, or still open: a function may call itself
            self._text(f"again {self._places[id(value)]}")
        else:
            self._places[id(value)] = len(self._places)
            self._alive.append(value)  # so that no other object gets the same identity
            self._visit(value)

    def _visit(self, value: Any) -> None:
        match value:
            case Tensor():
                self._tensor(value)
            case nn.Module():
                self._module(value)
            case types.FunctionType():
                self._function(value)
            case types.MethodType():
                self._all(value.__func__, value.__self__)
            case functools.partial():
                self._all(value.func, value.args, value.keywords)
            case Mapping():
                self._mapping(value)
            case set() | frozenset():
                self._all("set", *sorted(value, key=repr))
            case list() | tuple():
                self._all(f"{type(value).__name__} of {len(value)}", *value)
            case _:
                self._object(value)

    def _all(self, *values: Any) -> None:
        for value in values:
            self.take(value)

    def _text(self, text: str) -> None:
        self._bytes(text.encode(errors="surrogateescape"))

    def _bytes(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self.found.update(view.nbytes.to_bytes(8, "little"))
        self.found.update(view)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self._text(f"mapping of {len(value)}")
        for key in sorted(value, key=repr):
            self._all(key, value[key])

    def _module(self, module: nn.Module) -> None:
        self._class(type(module))
        self._text(str(module.training))
        self._mapping({k: v for k, v in vars(module).items() if k not in _MODULES_OWN})
        for held in (module._parameters, module._buffers, module._modules):
            self._mapping(held)

    def _class(self, kind: type) -> None:
        """A class by its name, and by its source and that of its bases where they are no library's."""
        for base in kind.__mro__:
            self._text(f"{base.__module__}.{base.__qualname__}")
            if not f"{base.__module__}.".startswith(_LIBRARIES):
                self._text(_source(base))

    def _function(self, function: types.FunctionType) -> None:
        """A function by its name and source, and by what it brought along from where it was made."""
        self._text(f"{function.__module__}.{function.__qualname__}")
        self._bytes(_source(function).encode() or function.__code__.co_code)
        self._all(function.__defaults__, function.__kwdefaults__)
        if f"{function.__module__}.".startswith(_LIBRARIES):
            return
        try:
            outside = inspect.getclosurevars(function)
        except ValueError:  # a closure's cell that is still empty
            return
        self._mapping({**outside.globals, **outside.nonlocals})

    def _object(self, value: Any) -> None:
        self._class(type(value))
        if hasattr(value, "__array__"):
            self._tensor(torch.as_tensor(value))
        elif getattr(value, "__dict__", None):
            self._mapping(vars(value))
        else:
            self._bytes(cloudpickle.dumps(value))

    def _tensor(self, tensor: Tensor) -> None:
        self._text(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            self._bytes(cloudpickle.dumps(tensor.detach().cpu()))
        elif tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._bytes(flat.view(torch.uint8).numpy().data)


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed in at a prompt, or written in C
        return ""
