"""How the report reads results: as views that know rows from columns and are only ever read in bounded slices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jacray_workers.plan import ArrayPlan, Plan
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

Array = NDArray[Any]
Side = Literal["input", "param"]

READ = 1 << 24  # numbers read of one array for one purpose: 64 MiB in float32
AT_ONCE = 1 << 21  # numbers held at a time


@dataclass(frozen=True, eq=False)
class View:
    """One array of a result, seen as samples x rows x leaf. Nothing is read until `read`.

    Attributes:
        name: what stands behind the result's name in the store: output and leaf where there are several, else empty.
        leaf: the name of what it is differentiated with respect to, or empty.
        value: the array, samples first where it has samples.
        samples: how many there are; 0 where the array has no such axis.
        rows: output numbers per sample; 1 for what has no output axes.
        shape: of one sample's leaf, or of the parameter.
        side: whether the leaf is each sample's own or a parameter.
        out, index: which output and which leaf of the plan; -1 where it belongs to all.
    """

    name: str
    leaf: str
    value: Any
    samples: int
    rows: int
    shape: tuple[int, ...]
    side: Side
    out: int = -1
    index: int = -1

    @property
    def columns(self) -> int:
        """Numbers in the leaf."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Numbers per sample."""
        return self.rows * self.columns

    def read(self, samples: Array) -> Array:
        """These samples as `(n, rows, columns)`; n is 1 where there is no sample axis."""
        # A block in factors picks samples by tensor without becoming dense as a whole.
        index = torch.from_numpy(samples) if isinstance(self.value, torch.Tensor) else samples
        return to_numpy(self.value[index] if self.samples else self.value).reshape(-1, self.rows, self.columns)

    def spread(self, most: int, numbers: int = READ) -> Array:
        """At most `most` samples from first to last; none at all where one holds more than so many numbers."""
        return spread(self.samples, min(most, numbers // max(self.size, 1)))

    def chunks(self, samples: Array) -> Iterator[tuple[slice, Array]]:
        """These samples a few at a time: where they stand in the list, and what `read` gives."""
        step = max(AT_ONCE // max(self.size, 1), 1)
        for start in range(0, len(samples), step):
            place = slice(start, min(start + step, len(samples)))
            yield place, self.read(samples[place])


def spread(total: int, most: int) -> Array:
    """At most `most` of the numbers below `total`, evenly from first to last."""
    count = max(min(most, total), 0)
    return np.unique(np.linspace(0, max(total - 1, 0), count).round().astype(np.int64))


def to_numpy(value: Any) -> Array:
    """A slice as numpy in a precision that numpy has."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    array: Array = np.asarray(value)
    return array


def views(result: Any, name: str) -> list[View]:
    """The arrays of one result; empty where it was not asked for.

    Args:
        result: has the results as attributes, and `plan`.
        name: `jacobian`, `weighted_gradient`, `singular_values`, ...
    """
    tree = getattr(result, name, None)
    if tree is None:
        return []
    plan: Plan | None = getattr(result, "plan", None)
    found = [(_dotted(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0] if _is_array(leaf)]
    arrays = list(plan.array(name)) if plan is not None else []
    planned = [(path, value, _matching(arrays, path, value)) for path, value in found]
    return [_guess(name, path, v) if a is None else _view(v, a, plan) for path, v, a in planned]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


def _dotted(path: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _matching(arrays: list[ArrayPlan], path: str, value: Any) -> ArrayPlan | None:
    """The array of the plan that a value is; taken off the list unless it is the last of its shape."""
    alike = [a for a in arrays if tuple(a.shape) == tuple(value.shape)]
    named = [a for a in alike if a.key.partition(".")[2].replace("inputs.", "") == path.replace("inputs.", "")]
    chosen = next(iter([*named, *alike]), None)
    if chosen is not None and len(alike) > 1:
        arrays.remove(chosen)
    return chosen


def _guess(name: str, path: str, value: Any) -> View:
    """A value that the plan does not list, in the layout that results usually have: samples, one output axis, leaf."""
    outs = {"jacobian": 1, "outputs": value.ndim - 1}.get(name, 0)
    side: Side = "param" if path and not path.startswith("inputs") else "input"
    body = tuple(value.shape[1:])
    return View(path, path, value, value.shape[0], math.prod(body[:outs]), body[outs:], side)


def _view(value: Any, array: ArrayPlan, plan: Plan | None) -> View:
    if array.dims[:1] in (("cotangent",), ("tangent",)):  # several weights: the first stands for them
        value = value.at(0) if hasattr(value, "at") else value[0]  # what is on disk stays there
    shape = tuple(value.shape)
    samples = shape[0] if array.axis >= 0 else 0
    dims = array.dims[-len(shape) :] if shape else ()
    body = shape[1:] if samples else shape
    outs = _output_axes(dims[1:] if samples else dims, body, array, plan)
    rows, leaf_shape = body[:outs], body[outs:]
    return View(
        array.key.partition(".")[2], _stem(dims, outs, samples), value, samples, math.prod(rows), leaf_shape,
        _side(array, dims, leaf_shape), array.out, array.leaf,
    )  # fmt: skip


def _output_axes(dims: tuple[str, ...], shape: tuple[int, ...], array: ArrayPlan, plan: Plan | None) -> int:
    """How many axes belong to the output: those called `output_0`, `output_1`, ... or `output.KEY_0`, ..."""
    if array.out < 0:
        return 0
    if array.leaf < 0:
        return len(dims)
    stem = dims[0].rpartition("_")[0] if dims else ""
    count = 0
    if re.match(r"output(\.|$)", stem):
        while count < len(dims) and dims[count] == f"{stem}_{count}":
            count += 1
    # A scalar output has no axes, and a parameter may itself be called `output`.
    lone = plan is not None and len({a.out for a in plan.array(array.name)}) == 1
    return 0 if lone and plan is not None and math.prod(shape[:count]) != plan.rows else count


def _stem(dims: tuple[str, ...], outs: int, samples: int) -> str:
    rest = dims[outs + (1 if samples else 0) :]
    return rest[-1].rpartition("_")[0] if rest else ""


def _side(array: ArrayPlan, dims: tuple[str, ...], shape: tuple[int, ...]) -> Side:
    """A parameter is always named in its array's key; an input is unnamed or starts with `inputs`."""
    stem = dims[-1].rpartition("_")[0] if shape else ""
    if not shape:
        return "param" if "." in array.key and ".inputs" not in array.key else "input"
    named = array.key.endswith(f".{stem}") and not array.key.endswith(f"inputs.{stem}")
    return "param" if named and not stem.endswith((":input", ":output")) else "input"
