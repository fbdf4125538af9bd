"""Names and structure of the pytrees that models take and return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import InputError


@dataclass(frozen=True)
class Arguments:
    """How a batch of input leaves becomes a call of the model.

    Attributes:
        spec: the pytree structure of the inputs.
        names: a dotted name per leaf; the empty string for a bare tensor.
        style: `one` passes the tree as a single argument, `positional` and `keyword` spread its first level.
        aliases: other names a leaf answers to, from the model's signature.
    """

    spec: pytree.TreeSpec
    names: tuple[str, ...]
    style: str
    aliases: tuple[tuple[str, int], ...]

    def bind(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments that these leaves stand for."""
        tree = pytree.tree_unflatten(list(leaves), self.spec)
        if self.style == "positional":
            return tuple(tree), {}
        if self.style == "keyword":
            return (), dict(tree)
        return (tree,), {}

    def index(self, name: str) -> int | None:
        """The leaf that a name means, or None."""
        if name in self.names:
            return self.names.index(name)
        return dict(self.aliases).get(name)


def arguments(model: Callable[..., Any], inputs: Any) -> tuple[Arguments, list[Tensor]]:
    """Name the leaves of `inputs` and find how the model takes them.

    A tensor or a list is one argument. A tuple is spread over positional arguments and a dict over keywords where
    the model's signature takes them so; otherwise either is one argument.

    Raises:
        InputError: there is no tensor, a leaf is no tensor, the batch is empty, or its sizes disagree.
    """
    if isinstance(inputs, list) and _numbers(inputs):
        inputs = torch.tensor(inputs)
    paths, spec = pytree.tree_flatten_with_path(inputs)
    names = tuple(".".join(_part(key) for key in path) for path, _ in paths)
    leaves = [as_tensor(leaf, name) for name, (_, leaf) in zip(names, paths, strict=True)]
    check_batch(leaves, names)
    style, aliases = _style(model, inputs, names)
    return Arguments(spec, names, style, aliases), leaves


def as_tensor(value: Any, name: str = "") -> Tensor:
    """A tensor from a tensor, a numpy array or numbers in nested lists.

    Raises:
        InputError: the value is none of these.
    """
    argument = f"inputs.{name}" if name else "inputs"
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        array = np.ascontiguousarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(value)
    raise InputError(argument, "must be a tensor, or a pytree of tensors, with the batch first", type(value).__name__)


def check_batch(leaves: Sequence[Tensor], names: Sequence[str]) -> int:
    """The batch size that every leaf shares.

    Raises:
        InputError: there is no leaf, a leaf has no batch axis, the batch is empty, or the sizes disagree.
    """
    if not leaves:
        raise InputError("inputs", "must hold at least one tensor")
    for leaf, name in zip(leaves, names, strict=True):
        argument = f"inputs.{name}" if name else "inputs"
        if leaf.dim() == 0:
            raise InputError(
                argument,
                "must have the batch as its first axis",
                "a tensor without axes",
                "for a single sample add the axis: x.unsqueeze(0)",
            )
        if leaf.shape[0] == 0:
            raise InputError(argument, "must hold at least one sample", f"shape {tuple(leaf.shape)}")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        shown = ", ".join(f"{n or 'inputs'}: {t.shape[0]}" for n, t in zip(names, leaves, strict=True))
        raise InputError("inputs", "must have the same batch size in every leaf", shown)
    return sizes.pop()


def _numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_numbers(part) for part in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _part(key: Any) -> str:
    """One step of a pytree path as text."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _style(model: Callable[..., Any], inputs: Any, names: Sequence[str]) -> tuple[str, tuple[tuple[str, int], ...]]:
    signature = _signature(model)
    parameters = [] if signature is None else [p.name for p in signature.parameters.values()]
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields") and _binds(signature, inputs, {}):
        return "positional", tuple(zip(parameters, range(len(names)), strict=False)) if len(names) == len(
            inputs
        ) else ()
    if isinstance(inputs, dict) and all(isinstance(k, str) for k in inputs) and _binds(signature, (), inputs):
        return "keyword", ()
    return "one", ((parameters[0], 0),) if parameters and len(names) == 1 else ()


def _signature(model: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if signature is None:
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
