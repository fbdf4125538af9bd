"""Cotangents and tangents as users give them, in the one shape that kernels take."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray_workers.errors import Plain, RequestError
from jacray_workers.problem.problem import Problem


@dataclass(frozen=True)
class Directions:
    """Cotangents or tangents of a whole job.

    Attributes:
        parts: per output or per leaf, `(K, B or 1, *shape)`.
        many: whether the caller gave K of them, so that results lead with K.
        axes: per output or leaf, how many axes the caller gave beyond one sample's: 0, 1 or 2.
    """

    parts: tuple[Tensor, ...]
    many: bool

    @property
    def count(self) -> int:
        """K."""
        return self.parts[0].shape[0] if self.parts else 1

    def select(self, start: int, stop: int) -> list[Tensor]:
        """The part that belongs to these samples: `(K, stop - start, *shape)` each, without a copy."""
        size = stop - start
        return [
            part.expand(part.shape[0], size, *part.shape[2:]) if part.shape[1] == 1 else part[:, start:stop]
            for part in self.parts
        ]


def cotangents(problem: Problem, weights: Any, samples: int) -> Directions:
    """`weights` by output, each `(K, B or 1, *out)`.

    Raises:
        RequestError: a shape is not one of the three allowed, which are named.
    """
    shapes = [out.shape for out in problem.outs]
    if weights is None:
        if any(len(out.rows) != 1 for out in problem.outs):
            raise RequestError(
                "weights",
                "are required where an output is not a scalar",
                Plain("no weights"),
                f"give {_allowed(shapes[0], samples)}",
            )
        ones = tuple(torch.ones(1, 1, *s, dtype=problem.dtype, device=problem.device) for s in shapes)
        return Directions(ones, many=False)
    given = _spread(weights, problem.out_tree, len(shapes), "weights")
    dtypes = [problem.dtype] * len(shapes)
    return _normalise(given, shapes, samples, dtypes, problem.device, "weights", [o.key for o in problem.outs], False)


def tangents(problem: Problem, vectors: Any, samples: int) -> Directions:
    """`vectors` by leaf, each `(K, B or 1, *leaf)`.

    Raises:
        RequestError: none were given, or a shape is not one of those allowed.
    """
    shapes = [leaf.shape for leaf in problem.leaves]
    if vectors is None:
        raise RequestError("vectors", "are required for a jvp", Plain("none"), f"give {_allowed(shapes[0], samples)}")
    given = _spread(vectors, problem.wrt_tree, len(shapes), "vectors")
    dtypes = [leaf.dtype for leaf in problem.leaves]
    keys = [leaf.key for leaf in problem.leaves]
    return _normalise(given, shapes, samples, dtypes, problem.device, "vectors", keys, True)


def _spread(value: Any, tree: Any, count: int, argument: str) -> list[Any]:
    """One entry per output or leaf, following the structure that results have."""
    if not isinstance(value, _NESTS) and sum(slot is not None for slot in pytree.tree_leaves(tree)) == 1:
        # Where there is one output or leaf alone, whatever it lies in, its tensor will do.
        return [value]
    found: list[Any] = [None] * count
    _fit(value, tree, argument, argument, found)
    if all(part is None for part in found):
        raise RequestError(argument, "must hold at least one tensor", Plain("none"))
    return found


_NESTS = (Mapping, list, tuple)


def _fit(value: Any, tree: Any, argument: str, place: str, found: list[Any]) -> None:
    """Put the parts of a nest where the results' structure has its slots; a name left out, or None, is left out.

    Raises:
        RequestError: the nest has another structure.
    """
    if tree is None or isinstance(tree, int):
        if tree is not None:
            found[tree] = value
    elif isinstance(tree, Mapping) and isinstance(value, Mapping):
        unknown = [str(key) for key in value if key not in tree]
        if unknown:
            raise RequestError(
                place, "names what is not there", unknown[0], f"known names: {', '.join(map(str, tree))}"
            )
        for key in value:
            _fit(value[key], tree[key], argument, f"{place}.{key}", found)
    elif isinstance(tree, list | tuple) and isinstance(value, list | tuple) and len(tree) == len(value):
        for i, (part, inner) in enumerate(zip(value, tree, strict=True)):
            _fit(part, inner, argument, f"{place}.{i}", found)
    elif value is not None:
        _fit_other(value, tree, argument, place, found)


def _fit_other(value: Any, tree: Any, argument: str, place: str, found: list[Any]) -> None:
    """The same for containers of the user's own, which torch must know."""
    if not isinstance(tree, _NESTS):
        slots, spec = pytree.tree_flatten(tree)
        with contextlib.suppress(ValueError, TypeError, KeyError):
            parts = spec.flatten_up_to(value)
            found[:] = [dict(zip(slots, parts, strict=True)).get(i, part) for i, part in enumerate(found)]
            return
    rule = f"must have the structure of the results: {_shown(tree)}"
    got = f"{type(value).__name__} of {len(value)}" if isinstance(value, _NESTS) else type(value).__name__
    raise RequestError(place, rule, Plain(got), f"K of them stand along a leading axis of every tensor in {argument}")


def _shown(tree: Any) -> str:
    """A structure in a few words."""
    if isinstance(tree, Mapping):
        return f"a dict with the names {', '.join(map(str, tree))}"
    return f"a {type(tree).__name__} of {len(tree)}" if isinstance(tree, list | tuple) else f"a {type(tree).__name__}"


def _normalise(
    given: Sequence[Any],
    shapes: Sequence[tuple[int, ...]],
    samples: int,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    argument: str,
    keys: Sequence[str],
    loose: bool,
) -> Directions:
    parts: list[Tensor | None] = []
    many: set[int] = set()
    several = len(shapes) > 1
    for value, shape, dtype, key in zip(given, shapes, dtypes, keys, strict=True):
        if value is None:
            parts.append(None)
            continue
        name = f"{argument}.{key}" if several and key else argument
        tensor = _tensor(value, name).to(device=device, dtype=dtype)
        extra = tensor.dim() - len(shape)
        fits = 0 <= extra <= 2 and tuple(tensor.shape[extra:]) == tuple(shape)
        sized = extra == 0 or (
            fits and (tensor.shape[extra - 1] == samples or (loose and tensor.shape[extra - 1] == 1))
        )
        if not (fits and sized) or (extra == 2 and tensor.shape[0] == 0):
            raise RequestError(
                name, f"must have one of the shapes {_allowed(shape, samples)}", Plain(f"shape {tuple(tensor.shape)}")
            )
        many.add(tensor.shape[0] if extra == 2 else 0)
        parts.append(tensor.reshape((1,) * (2 - extra) + tuple(tensor.shape)))
    if len(many) > 1:
        rule = "must hold K directions, the same K, for every name, or one for each"
        raise RequestError(argument, rule, Plain(f"K = {', '.join(str(k or 'none') for k in sorted(many))}"))
    k = max(many) or 1
    filled = tuple(
        torch.zeros(k, 1, *shape, dtype=dtype, device=device) if part is None else part
        for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)
    )
    return Directions(filled, many=many != {0})


def _tensor(value: Any, name: str) -> Tensor:
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(name, "must be numbers: a tensor, an array or nested lists of one shape", value) from None
    if tensor.is_complex():
        raise RequestError(name, "must be real", str(tensor.dtype))
    return tensor


def _allowed(shape: tuple[int, ...], samples: int) -> str:
    inner = ", ".join(map(str, shape))

    def show(*lead: object) -> str:
        parts = [*map(str, lead), *([inner] if inner else [])]
        return f"({', '.join(parts)}{',' if len(parts) == 1 and len(shape) + len(lead) == 1 else ''})"

    return f"{show()} the same for every sample, {show(samples)} one per sample, {show('K', samples)} K of them"
