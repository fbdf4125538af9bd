"""The same work at other samples: what was prepared for one batch, used for batches of any size.

A service is asked for the same derivatives of the same model again and again. What depends on the model and the kind
of request alone (names, method, arrays) is kept; only the samples and their directions are read afresh. Several small
batches can be computed as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray_workers.engine import Prepared
from jacray_workers.errors import InputError, Plain
from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.planning import relook
from jacray_workers.problem import weights
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.weights import Directions
from jacray_workers.request import Request


@dataclass(frozen=True)
class Batch:
    """Some samples and what is asked of them.

    Attributes:
        inputs: a tensor or a pytree of tensors, the batch first.
        request: the request with this batch's directions.
    """

    inputs: Any
    request: Request


def again(prepared: Prepared, batches: Sequence[Batch]) -> Prepared | None:
    """The prepared work for other samples: those of all batches, one after another.

    Args:
        prepared: made with the same model and the same request but for `weights` and `vectors`.
        batches: of the same structure, types and shapes per sample.

    Returns:
        The work, or None where the directions are not of the kind that it was prepared for, or where samples that its
        plan takes together are no longer apart.

    Raises:
        InputError: the inputs differ in more than their number of samples.
        RequestError: a direction has a shape that is not allowed.
    """
    flat = [_leaves(prepared, batch.inputs) for batch in batches]
    leaves = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*flat, strict=True)]
    ks, vs = _directions(prepared, batches, [part[0].shape[0] for part in flat])
    if not (_alike(ks, prepared.cotangents) and _alike(vs, prepared.tangents)):
        return None
    samples, plan = leaves[0].shape[0], prepared.plan
    plan = plan if samples == plan.samples else resized(plan, samples)
    if not relook.holds(prepared.problem, plan, leaves):
        return None
    return replace(
        prepared, request=batches[0].request, plan=plan, leaves=tuple(leaves), cotangents=ks, tangents=vs
    )  # fmt: skip


def joined(prepared: Prepared, batches: Sequence[Batch]) -> Batch:
    """Several batches as one that can be prepared; `prepared` is the same work for one of them."""
    flat = [_leaves(prepared, batch.inputs) for batch in batches]
    leaves = [torch.cat(parts) for parts in zip(*flat, strict=True)]
    ks, vs = _directions(prepared, batches, [part[0].shape[0] for part in flat])
    problem = prepared.problem
    inputs = pytree.tree_unflatten(leaves, problem.call.spec)
    changes = {"weights": _as_given(ks, problem.out_tree), "vectors": _as_given(vs, problem.wrt_tree)}
    return Batch(inputs, batches[0].request.model_copy(update=changes))


def resized(plan: Plan, samples: int) -> Plan:
    """The plan for another number of samples in one shard; its chunk keeps within the same memory."""
    per_sample = max(plan.peak_bytes / max(min(plan.chunk_size, plan.samples), 1), 1.0)
    fits = max(int(plan.budget_bytes / per_sample), 1)
    # A chunk smaller than the batch that it was made for was bounded by something: memory, or speed.
    chunk = min(samples, fits) if plan.chunk_size >= plan.samples else min(samples, plan.chunk_size)
    return replace(
        plan,
        samples=samples,
        chunk_size=chunk,
        shard_size=-(-samples // chunk) * chunk,
        arrays=tuple(_sized(array, samples) for array in plan.arrays),
        bytes_out=int(plan.bytes_out * samples / max(plan.samples, 1)),
        peak_bytes=int(per_sample * chunk),
    )


def apart(prepared: Prepared) -> bool:
    """Whether the answers of several batches that are computed as one can be taken apart again.

    Every array has a part per sample and nothing else, and no sample's numbers depend on its place in the batch.
    """
    plan, request = prepared.plan, prepared.request
    own = all(a.axis >= 0 and not a.factored and a.name != "ntk" for a in plan.arrays)
    return own and plan.batched and not prepared.problem.random and not request.training


def parts(plan: Plan, blocks: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The part of every array that belongs to some of the samples."""
    return {a.key: blocks[a.key].narrow(a.axis, start, stop - start) for a in plan.arrays}


def _leaves(prepared: Prepared, inputs: Any) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten(inputs)
    if spec != prepared.problem.call.spec or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise InputError("inputs", "must have the structure that the work was prepared for", Plain(str(spec)))
    for leaf, like in zip(leaves, prepared.leaves, strict=True):
        if leaf.dim() == 0 or leaf.shape[1:] != like.shape[1:] or leaf.dtype != like.dtype:
            rule = f"must be {str(like.dtype)[6:]} of shape (B, {', '.join(map(str, like.shape[1:]))})"
            raise InputError("inputs", rule, Plain(f"{str(leaf.dtype)[6:]} of shape {tuple(leaf.shape)}"))
    if len({leaf.shape[0] for leaf in leaves}) != 1 or leaves[0].shape[0] == 0:
        shown = Plain(", ".join(str(leaf.shape[0]) for leaf in leaves))
        raise InputError("inputs", "must have the same number of samples in every part, at least one", shown)
    return leaves


def _directions(
    prepared: Prepared, batches: Sequence[Batch], sizes: Sequence[int]
) -> tuple[Directions | None, Directions | None]:
    problem = prepared.problem
    ks = None if prepared.cotangents is None else _together(problem, batches, sizes, weights.cotangents, "weights")
    vs = None if prepared.tangents is None else _together(problem, batches, sizes, weights.tangents, "vectors")
    return ks, vs


def _together(
    problem: Problem, batches: Sequence[Batch], sizes: Sequence[int], read: Callable[..., Directions], name: str
) -> Directions:
    """Every batch's directions along the samples."""
    found = [read(problem, getattr(b.request, name), size) for b, size in zip(batches, sizes, strict=True)]
    if len(found) == 1:
        return found[0]
    if len({(d.count, d.many) for d in found}) > 1:
        raise InputError(name, "must be as many in every batch that is computed with it", [d.count for d in found])
    spread = [d.select(0, size) for d, size in zip(found, sizes, strict=True)]
    return Directions(tuple(torch.cat(same, dim=1) for same in zip(*spread, strict=True)), found[0].many)


def _alike(new: Directions | None, known: Directions | None) -> bool:
    if new is None or known is None:
        return new is known
    return (new.count, new.many) == (known.count, known.many)


def _as_given(directions: Directions | None, tree: Any) -> Any:
    """Directions as a caller would give them, in the structure of the results."""
    if directions is None:
        return None
    parts = [part if directions.many else part[0] for part in directions.parts]
    return pytree.tree_map(lambda at: None if at is None else parts[at], tree)


def _sized(array: ArrayPlan, samples: int) -> ArrayPlan:
    if array.axis < 0:
        return array
    shape = list(array.shape)
    shape[array.axis] = samples
    if array.name == "ntk":
        shape[1] = samples
    return replace(array, shape=tuple(shape))
