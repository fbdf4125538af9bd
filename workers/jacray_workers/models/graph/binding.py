"""How a call's arguments become the tensors that a graph starts from."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray_workers.errors import InputError, ModelError, Plain
from jacray_workers.models.graph.document import Document, InputEntry

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Binding:
    """The signature of an exported module, and where each tensor stands among the arguments.

    Attributes:
        signature: of the module's `forward`.
    """

    def __init__(self, document: Document) -> None:
        self.entries = document.inputs
        self.signature = _signature(document)
        self.optional = {p.name for p in document.signature if p.optional}
        self.paths = [tuple(entry.path) for entry in self.entries]
        names = [p.name for p in self.signature.parameters.values() if p.kind in _POSITIONAL]
        self.plain = self.paths == [(name,) for name in names[: len(self.paths)]]

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the graph's order.

        Raises:
            InputError: a tensor is missing, or has another shape or kind of dtype than the graph was exported for.
        """
        found = list(args) if self.plain and not kwargs and len(args) == len(self.paths) else self._sorted(args, kwargs)
        for tensor, entry in zip(found, self.entries, strict=True):
            if not isinstance(tensor, Tensor):
                raise InputError(_name(entry.path), "must be a tensor", type(tensor).__name__)
            if tuple(tensor.shape[1:]) != entry.shape or tensor.dim() == 0:
                rule = f"must have the shape that the model was exported for, a batch of {list(entry.shape)}"
                way_out = "export the module again with an example of this shape"
                raise InputError(_name(entry.path), rule, Plain(str(list(tensor.shape))), way_out)
            if _sort(tensor.dtype) != _sort(getattr(torch, entry.dtype)):
                rule = f"must be of the kind that the model was exported for, {entry.dtype}"
                raise InputError(_name(entry.path), rule, Plain(str(tensor.dtype)[6:]))
        if len({tensor.shape[0] for tensor in found}) > 1:
            raise InputError("inputs", "must share one batch size", Plain(str([t.shape[0] for t in found])))
        return found

    def _sorted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ModelError("model", f"takes {self._wanted()}: {error}", Plain("other arguments")) from None
        given = {name: value for name, value in bound.items() if not (value is None and name in self.optional)}
        found = {tuple(_step(key) for key in path): leaf for path, leaf in pytree.tree_flatten_with_path(given)[0]}
        if set(found) != set(self.paths):
            odd = sorted(".".join(map(str, path)) for path in set(found) ^ set(self.paths))
            raise ModelError("model", f"takes {self._wanted()}, as in the example it was exported with", odd[0])
        return [found[path] for path in self.paths]

    def _wanted(self) -> str:
        return "the tensors " + ", ".join(".".join(map(str, path)) for path in self.paths)


def blank(entry: InputEntry, batch: int, precision: torch.dtype | None = None) -> Tensor:
    """An input without data; a float one in the precision given."""
    dtype = getattr(torch, entry.dtype)
    wanted = precision if precision is not None and dtype.is_floating_point else dtype
    return torch.empty((batch, *entry.shape), dtype=wanted, device="meta")


def _signature(document: Document) -> inspect.Signature:
    empty = inspect.Parameter.empty
    variable = ("VAR_POSITIONAL", "VAR_KEYWORD")
    try:
        return inspect.Signature(
            [
                inspect.Parameter(
                    p.name,
                    getattr(inspect.Parameter, p.kind),
                    default=None if p.optional and p.kind not in variable else empty,
                )
                for p in document.signature
            ]
        )
    except ValueError as error:
        raise ModelError("model", f"has a graph with an impossible signature: {error}", Plain("a graph file")) from None


def _step(key: Any) -> str | int:
    """One step of a pytree's path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            found = getattr(key, attribute)
            return found if isinstance(found, str | int) else str(found)
    return str(key)


def steps(path: Sequence[Any]) -> tuple[str | int, ...]:
    """A pytree's path as plain names and places."""
    return tuple(_step(key) for key in path)


def _name(path: Sequence[str | int]) -> str:
    return "inputs." + ".".join(map(str, path))


def _sort(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"
