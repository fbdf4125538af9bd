"""The outputs of a problem: which of a model's return values are differentiated, and where their rows lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError, RequestError
from jacray_workers.problem.problem import FLOATS, Out
from jacray_workers.request import ModulePoint
from jacray_workers.validation import nearest


def output_point(outputs: Any) -> ModulePoint | None:
    """The hidden point that `outputs` names as a mapping, or None.

    Raises:
        RequestError: the mapping names a module and something that is no side of it.
    """
    if isinstance(outputs, Mapping) and "module" in outputs:
        try:
            return ModulePoint.model_validate(dict(outputs))
        except ValueError:
            raise RequestError("outputs", "must be {module: NAME, side: input | output}", dict(outputs)) from None
    return None


def outputs_of(y: Any, choice: Any, samples: int) -> tuple[tuple[Out, ...], Any, list[str]]:
    """Describe the outputs from what one sample gave.

    Raises:
        ModelError: no output has a float type, or one has no batch axis.
        RequestError: the choice of outputs names what is not there.
    """
    paths, spec = pytree.tree_flatten_with_path(y)
    names = [".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in p) for p, _ in paths]
    found = [leaf for _, leaf in paths]
    picks = _picks(choice, names, found)
    outs: list[Out] = []
    tree: list[int | None] = []
    notes: list[str] = []
    row = 0
    for index, (name, tensor) in enumerate(zip(names, found, strict=True)):
        label = f"output {name}" if name else "the output"
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            if isinstance(tensor, Tensor) and tensor.is_complex() and index in picks:
                raise ModelError("model", f"{label} is complex", str(tensor.dtype), "return torch.view_as_real(y)")
            if isinstance(tensor, Tensor):
                notes.append(f"{label} is {str(tensor.dtype)[6:]} and has no derivative")
            tree.append(None)
            continue
        if index not in picks:
            tree.append(None)
            continue
        shape = _sample_shape(tensor, label, samples)
        pick = picks[index]
        size = math.prod(shape) if pick is None else len(pick)
        whole = shape if pick is None else (size,)
        tree.append(len(outs))
        outs.append(Out(name, index, whole, pick, range(row, row + size), tensor.dtype))
        row += size
    if not outs:
        kinds = ", ".join(str(getattr(t, "dtype", type(t).__name__)).removeprefix("torch.") for t in found) or "nothing"
        raise ModelError("model", "must return at least one floating-point tensor", kinds)
    return tuple(outs), pytree.tree_unflatten(tree, spec), notes


def _sample_shape(tensor: Tensor, label: str, samples: int) -> tuple[int, ...]:
    if tensor.dim() == 0 and samples == 1:
        return ()
    if tensor.dim() == 0:
        raise ModelError(
            "model",
            f"must keep the batch as the first axis of {label}",
            "a scalar for the whole batch",
            "reduce over the other axes only, as in y.mean(dim=-1), so that every sample has its own output",
        )
    if tensor.shape[0] != 1:
        raise ModelError(
            "model",
            f"must keep the batch as the first axis of {label}",
            f"shape {tuple(tensor.shape)} for a batch of one",
            "put the batch first and keep its size",
        )
    return tuple(tensor.shape[1:])


def _picks(choice: Any, names: list[str], found: list[Any]) -> dict[int, tuple[int, ...] | None]:
    """For each output leaf that was chosen, the flat indices into it, or None for all."""
    if choice is None:
        return dict.fromkeys(range(len(names)), None)
    if isinstance(choice, str) or (
        isinstance(choice, list | tuple) and choice and all(isinstance(c, str) for c in choice)
    ):
        wanted = [choice] if isinstance(choice, str) else choice
        return {_name_index(name, names): None for name in wanted}
    if isinstance(choice, Mapping):
        return {
            (i := _name_index(str(name), names)): None if idx is None else _indices(idx, found[i], f"outputs.{name}")
            for name, idx in choice.items()
        }
    floats = [i for i, leaf in enumerate(found) if isinstance(leaf, Tensor) and leaf.dtype in FLOATS]
    if len(floats) > 1:
        raise RequestError(
            "outputs",
            "must say which output the indices are for, as the model returns several",
            choice,
            f"write {{{names[floats[0]]}: [...]}}; known outputs: {', '.join(names)}",
        )
    return {floats[0]: _indices(choice, found[floats[0]], "outputs")} if floats else {}


def _name_index(name: str, names: list[str]) -> int:
    if name not in names:
        known = [n for n in names if n]
        raise RequestError(
            "outputs",
            "names no output of the model",
            name,
            nearest(name, known) if known else "it returns one bare tensor",
        )
    return names.index(name)


def _indices(choice: Any, tensor: Tensor, argument: str) -> tuple[int, ...]:
    size = tensor.numel()
    rule = f"must be indices into one sample's flattened output of {size} numbers"
    values = choice.tolist() if hasattr(choice, "tolist") else choice
    values = list(values) if isinstance(values, list | tuple | range) else [values]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise RequestError(argument, rule, choice)
    wrong = [v for v in values if not -size <= v < size]
    if wrong:
        raise RequestError(argument, rule, wrong[0], f"use {-size} to {size - 1}")
    return tuple(v % size for v in values)
