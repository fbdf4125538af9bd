"""Compare a graph with the module that it was captured from: outputs and gradients, on the example's samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError
from jacray_workers.models.graph.capture import capture
from jacray_workers.models.graph.document import Document
from jacray_workers.models.graph.module import GraphModule
from jacray_workers.problem.problem import CallableModule, as_module
from jacray_workers.problem.session import seed_generators, session
from jacray_workers.problem.trees import Arguments, arguments

_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def checked(model: Any, example: Any) -> tuple[Document, dict[str, Tensor]]:
    """The graph of a module and its tensors, compared with the module on one sample and on all of the example.

    Raises:
        ModelError: torch.export cannot capture the module, it calls what graph files do not hold, or the graph does not
            repeat what the module and its gradients compute.
        InputError: the example is no batch of tensors.
    """
    document, tensors = capture(model, example)
    module = as_module(model)
    try:
        graph = GraphModule(document, tensors)
    except ModelError as error:
        rule = f"must be a module whose graph a file can hold, but it {error.rule}"
        raise ModelError(
            "model", rule, type(module).__name__, "keep to your own process or Ray, which take any"
        ) from None
    call, leaves = arguments(module.function if isinstance(module, CallableModule) else module, example)
    for size in sorted({1, len(leaves[0])}):
        few = [leaf.detach()[:size] for leaf in leaves]
        (values, slopes), (again, slopes_again) = (_computed(m, call, few) for m in (module, graph))
        if len(values) != len(again) or not all(map(_alike, values, again)):
            raise _unlike(module, f"the same outputs once captured, and does not for a batch of {size}")
        if not all(_alike(slope, slopes_again[name]) for name, slope in slopes.items()):
            raise _unlike(module, "the same gradients once captured, and does not")
    return document, tensors


def _unlike(module: nn.Module, what: str) -> ModelError:
    way_out = "it may depend on the batch size, on Python's state, or hide parts from autograd (checkpoint, no_grad)"
    return ModelError("model", f"must compute {what}", type(module).__name__, way_out)


def _computed(module: nn.Module, call: Arguments, leaves: list[Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
    """The outputs, and the gradients of a random combination of them wrt float inputs and parameters."""
    with session(module, training=False, tf32=False, seed=0, stateful=True), _learning(module) as state:
        inputs = {i: leaf.clone().requires_grad_() for i, leaf in enumerate(leaves) if leaf.is_floating_point()}
        args, kwargs = call.bind([inputs.get(i, leaf).clone() for i, leaf in enumerate(leaves)])
        seed_generators(0)
        found = pytree.tree_leaves(module(*args, **kwargs))
        wrt = {**{f"input {i}": tensor for i, tensor in inputs.items()}, **state}
        return [y.detach() if isinstance(y, Tensor) else y for y in found], _slopes(found, wrt)


def _slopes(found: list[Any], wrt: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = [y for y in found if isinstance(y, Tensor) and y.requires_grad and y.is_floating_point() and y.numel()]
    grads: Any = [None] * len(wrt)
    if rows and wrt:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in rows]
        grads = torch.autograd.grad(rows, list(wrt.values()), cotangents, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wrt.items(), grads, strict=True)}


@contextlib.contextmanager
def _learning(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The module's float parameters, with gradients on; a session has them off and restores the owner's choice."""
    state: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    for p in state.values():
        p.requires_grad_(True)
    try:
        yield state
    finally:
        for p in state.values():
            p.requires_grad_(False)


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    near = _NEAR.get(a.dtype, 1e-4)
    scale = min(float(a.nan_to_num().abs().amax()), 1e30) if a.numel() else 0.0
    return torch.allclose(a, b.to(a.device), rtol=near, atol=near * scale, equal_nan=True)
