"""Plain backward passes that leave a module as it was and go through what a model may do to them.

A checkpoint runs part of the model again during the backward pass, when the tensors put in place of the parameters must
still be there. And where one module is registered under several names, `functional_call` restores under the second name
what it had put there under the first. Both are met by holding the tables of parameters and buffers all the while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from jacray_workers.problem.problem import Problem

Forward = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
Head = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def held(problem: Problem, values: Sequence[Tensor]) -> Iterator[None]:
    """The problem's tensors, and the leaves' values, in the places of the module's own; undone on the way out.

    Without values the parameters among the leaves keep the problem's tensors.
    """
    module = problem.module
    known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    swapped = {leaf.name: v for leaf, v in zip(problem.leaves, values, strict=bool(values)) if leaf.side == "param"}
    put = {id(known[name]): tensor for name, tensor in {**problem.tensors, **swapped}.items() if name in known}
    # The tables of scripted modules are not dicts, and nothing can be put into them.
    tables = [t for part in module.modules() for t in (part._parameters, part._buffers) if type(t) is dict]
    saved = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: put[id(t)] for name, t in table.items() if id(t) in put})  # type: ignore[misc]
        yield
    finally:
        for table, before in zip(tables, saved, strict=True):
            table.clear()
            table.update(before)  # type: ignore[arg-type]


def gradients(
    problem: Problem, forward: Forward, values: Sequence[Tensor], batch: Sequence[Tensor], heads: Sequence[Head]
) -> list[list[Tensor]]:
    """The gradients wrt every leaf of each of several numbers made from the outputs.

    Args:
        problem: what is differentiated.
        forward: leaves' values and batch -> outputs.
        values: the leaves' values, requiring gradients.
        batch: the placed inputs.
        heads: outputs -> a number.
    """
    # The old kind of checkpoint drops the parameters within it where no input requires a gradient or none is asked for,
    # and allows nothing but a whole backward. Some models turn their inputs into numpy arrays, which asks for inputs
    # that require no gradient.
    awake = [leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for leaf in batch]
    failed: list[RuntimeError] = []
    with held(problem, values):
        for pull, inputs in ((_grad, awake), (_whole, awake), (_grad, batch)):
            wanted = [*values, *(leaf for leaf in inputs if leaf.requires_grad)]
            try:
                return [pull(head(forward(values, inputs)), wanted)[: len(values)] for head in heads]
            except RuntimeError as error:
                failed.append(error)
    raise failed[0]


def _grad(number: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    if not number.requires_grad:
        return [torch.zeros_like(value) for value in wanted]
    return list(torch.autograd.grad(number, wanted, allow_unused=True, materialize_grads=True))


def _whole(number: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The same by a backward to every leaf of the graph."""
    for value in wanted:
        value.grad = None
    if number.requires_grad:
        number.backward()
    return [torch.zeros_like(value) if value.grad is None else value.grad for value in wanted]
