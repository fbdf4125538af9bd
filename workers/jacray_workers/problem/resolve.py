"""From what a user typed to a `Problem`: names are resolved, shapes are probed, mistakes are refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.problem.finding import integer_error, leaves_of
from jacray_workers.problem.first import first_run, writes_hidden
from jacray_workers.problem.outputs import output_point, outputs_of
from jacray_workers.problem.placing import moved, pick_device, place
from jacray_workers.problem.points import find_module
from jacray_workers.problem.problem import FLOATS, CallableModule, Problem, as_module
from jacray_workers.problem.trees import Arguments, arguments
from jacray_workers.request import ModulePoint, Request

__all__ = ["moved", "pick_device", "place", "resolve"]


def resolve(model: Any, inputs: Any, request: Request) -> tuple[Problem, list[Tensor]]:
    """Make the problem, and the input leaves as tensors where the caller put them (not moved, not cast).

    One sample is run through the model to learn the shapes of its outputs.

    Raises:
        InputError, ModelError, RequestError: naming the argument, the rule, the value and the way out.
    """
    module = as_module(model)
    call, leaves = arguments(module.function if isinstance(module, CallableModule) else module, inputs)
    if "inputs" in request.wrt_list and not any(leaf.dtype in FLOATS for leaf in leaves):
        raise integer_error(module, "inputs", leaves[0])
    bare = _bare(module, call, leaves, request)
    with bare.session():
        y, problem, batch = first_run(bare, leaves)
        outs, out_tree, out_notes = outputs_of(y, None if bare.point else request.outputs, leaves[0].shape[0])
        wrt, wrt_tree, wrt_notes = leaves_of(problem, batch, request)
        problem = replace(
            problem,
            leaves=wrt,
            outs=outs,
            rows=sum(len(out.rows) for out in outs),
            dtype=functools.reduce(torch.promote_types, [out.dtype for out in outs]),
            wrt_tree=wrt_tree,
            out_tree=out_tree,
            notes=(*out_notes, *wrt_notes),
        )
        return (replace(problem, writes=True) if writes_hidden(problem, batch) else problem), leaves


def _bare(module: nn.Module, call: Arguments, leaves: Sequence[Tensor], request: Request) -> Problem:
    """The problem before anything was run: without leaves and outputs, and ready for the worst of a model's habits."""
    device = pick_device(request.device, module, leaves)
    cast = None if request.dtype is None else getattr(torch, request.dtype)
    point = request.outputs if isinstance(request.outputs, ModulePoint) else output_point(request.outputs)
    if point is not None:
        find_module(module, point.module, "outputs")
    return Problem(
        module=module,
        call=call,
        leaves=(),
        outs=(),
        rows=0,
        tensors=moved(module, device, cast),
        device=device,
        dtype=torch.float32,
        training=request.training,
        tf32=request.tf32,
        seed=request.seed,
        wrt_tree=None,
        out_tree=None,
        point=point,
        cast=cast,
        random=True,
        stateful=True,
    )
