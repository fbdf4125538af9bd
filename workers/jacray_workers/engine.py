"""Prepare a request, compute its shards, and put the parts together. The only door of this package.

prepare -> Prepared (problem, plan) -> run_shard, shard by shard -> combine -> assemble
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from jacray_workers import products
from jacray_workers.arrays import ArrayPlanner, structure
from jacray_workers.blocks.block import Block, dense_block
from jacray_workers.errors import InputError
from jacray_workers.plan import ArrayPlan, Plan
from jacray_workers.planning import memory, planner, relook
from jacray_workers.planning.case import WORKSPACE_SHARE, budget_of
from jacray_workers.planning.rehearsal import rehearse
from jacray_workers.problem import cache, weights
from jacray_workers.problem.far import far_leaves
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.resolve import resolve
from jacray_workers.problem.weights import Directions
from jacray_workers.request import Request
from jacray_workers.rowcuts import place
from jacray_workers.run import run_shard
from jacray_workers.shard import ShardResult
from jacray_workers.sources.ranged import Rows

__all__ = ["Prepared", "assemble", "combine", "prepare", "run_shard"]

FEW = 4  # samples by which the shapes of a source that is read by range are found out


@dataclass(frozen=True)
class Prepared:
    """Everything that computing a shard needs.

    Attributes:
        problem: the function to differentiate.
        request: what was asked for.
        plan: how it is computed.
        leaves: the whole job's input leaves, batch first, where the caller put them.
        cotangents, tangents: the directions of weighted gradients and JVPs, or None.
    """

    problem: Problem
    request: Request
    plan: Plan
    leaves: tuple[Tensor, ...]
    cotangents: Directions | None = None
    tangents: Directions | None = None
    extra: dict[Any, Any] = field(default_factory=dict)


def prepare(
    model: Any, inputs: Any, request: Request, *, plan: Plan | None = None, workers: int = 1, apart: bool = False
) -> Prepared:
    """Resolve names, check shapes, and make the plan where none is given.

    Args:
        model: an `nn.Module` or a callable of tensors.
        inputs: a tensor or a pytree of tensors, batch first; or rows of a source, which are read as they are needed.
        request: what to compute.
        plan: a plan made before for the same job, on another machine perhaps.
        workers: how many workers will share the job; decides the shards.
        apart: the result is kept elsewhere than where it is computed; bounds the shards too.

    Raises:
        UserError: the model, the inputs or the request break a rule, or the work cannot fit its memory.
    """
    rows = inputs if isinstance(inputs, Rows) else None
    if rows is not None:
        inputs = rows.read(0, min(FEW, rows.samples)).inputs
    key = None if rows is not None else cache.key_of(model, inputs, request, (workers, apart)) if plan is None else None
    kept = cache.recall(model, key)
    before = 0
    if kept is not None and relook.holds(*kept):
        problem, plan, leaves = kept
    else:
        before = memory.resident()
        problem, leaves = resolve(model, inputs, request)
        budget = budget_of(request, problem, workers) if plan is None else plan.budget_bytes
        problem = replace(problem, workspace=max(1, int(budget * WORKSPACE_SHARE)))
    if rows is not None:
        leaves = cast("list[Tensor]", far_leaves(rows, inputs))
    samples = leaves[0].shape[0]
    ks = weights.cotangents(problem, request.weights, samples) if "weighted_gradient" in request.returns else None
    wants_vectors = "jvp" in request.returns or request.vectors is not None
    vs = weights.tangents(problem, request.vectors, samples) if wants_vectors else None
    if plan is None:
        products.check(problem, request)
        arrays = ArrayPlanner(problem, request, samples, _lead(ks), _lead(vs)).all()
        plan = planner.choose(problem, leaves, request, arrays, workers, ks, vs, apart=apart)
        problem = replace(problem, compared=plan.compared)
        plan = rehearse(Prepared(problem, request, plan, tuple(leaves), ks, vs), before)
        cache.remember(model, key, problem, plan)
    elif plan.samples != samples:
        raise InputError("inputs", f"must have the {plan.samples} samples that the plan was made for", samples)
    elif plan.compared:
        problem = replace(problem, compared=True)
    return Prepared(problem, request, plan, tuple(leaves), ks, vs)


def _lead(directions: Directions | None) -> int:
    return directions.count if directions is not None and directions.many else 0


def combine(plan: Plan, results: Sequence[ShardResult]) -> dict[str, Tensor]:
    """Whole arrays by key from the shards' parts: joined along the samples, or added up in the shards' order.

    Raises:
        InputError: the shards do not cover the samples exactly once.
    """
    ordered = sorted(results, key=lambda result: result.shard.index)
    if [r.shard for r in ordered] != list(plan.shards()):
        raise InputError("results", "must hold every shard exactly once", f"{len(ordered)} of {plan.shard_count}")
    if plan.row_cuts:
        return {array.key: _fill(plan, array, ordered) for array in plan.arrays}
    return {array.key: _join(array, [r.blocks[array.key] for r in ordered]) for array in plan.arrays}


def _fill(plan: Plan, array: ArrayPlan, ordered: Sequence[ShardResult]) -> Tensor:
    """An array of which some shards hold some rows, and some nothing."""
    parts = [(r.blocks[array.key], place(plan, array, r.shard)) for r in ordered if array.key in r.blocks]
    if array.axis < 0 or array.factored:
        return _join(array, [part for part, _ in parts])
    whole = torch.empty(array.shape, dtype=parts[0][0].dtype)
    for part, where in parts:
        if where is not None:
            whole[where] = part
    return whole


def _join(array: ArrayPlan, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if array.axis < 0:
        # Float64 keeps the sum of many partial sums from drifting with their number.
        total = parts[0].double()
        for part in parts[1:]:
            total = total + part
        return total.to(parts[0].dtype)
    cat = getattr(type(parts[0]), "cat", None)
    return cat(parts) if cat is not None else torch.cat(parts, dim=array.axis)


def assemble(prepared: Prepared, blocks: dict[str, Any]) -> dict[str, Any]:
    """Result name -> the user's structure: a tensor, a dict for parameters, the model's own for pytrees."""
    found: dict[str, Any] = {}
    for name in prepared.request.returns:
        by_place = {(a.out, a.leaf): _with_methods(prepared, a, blocks[a.key]) for a in prepared.plan.array(name)}
        found[name] = structure(prepared.problem, prepared.request, name, by_place)
    return found


def _with_methods(prepared: Prepared, array: ArrayPlan, value: Any) -> Any:
    """Unless plain tensors were asked for, every parameter block has a block's methods, dense or not."""
    blockwise = array.name == "jacobian" and prepared.request.form != "dense"
    if not blockwise or prepared.problem.leaves[array.leaf].side != "param" or isinstance(value, Block):
        return value
    if not isinstance(value, Tensor):
        return value
    leaf = prepared.problem.leaves[array.leaf]
    return dense_block(value, prepared.problem.outs[array.out].shape, leaf.shape)
