"""The brute-force reference: float64, one sample at a time, one output number at a time, plain autograd.

Nothing of jacray is used here, and nothing is clever: what this file says is what a Jacobian is.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Blocks smaller than this share of the largest are compared with the largest: a gradient that is zero on paper (the
# bias of attention's keys) is rounding noise, which has no relative error worth a name.
SMALL = 1e-3


def jacobian(
    model: Any,
    inputs: Any,
    wrt: Any = "inputs",
    *,
    spread: bool = True,
    training: bool = False,
    seed: int | None = None,
) -> Any:
    """The Jacobian in the structure that results have: the outputs' pytree, and in every place that of `wrt`.

    Args:
        model: a module or a function; a module is copied and made float64.
        inputs: a tensor or a pytree, batch first.
        wrt: `inputs`, `params`, a parameter glob, `{module, side}`, or a list of these.
        spread: a tuple of inputs goes over positional arguments and a dict over keywords.
        training: the mode.
        seed: set before every call of the model.
    """
    samples = next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    # A twin for each sample: what a model keeps from one call is not there in the next.
    parts = [_one(_double(model, training), _sample(inputs, i), wrt, spread, seed) for i in range(samples)]
    specs = {str(pytree.tree_structure(part, is_leaf=_is_none)) for part in parts}
    assert len(specs) == 1, specs
    return pytree.tree_map(_cat, parts[0], *parts[1:], is_leaf=_is_none)


def outputs(model: Any, inputs: Any, *, spread: bool = True, training: bool = False, seed: int | None = None) -> Any:
    """What the model returns for each sample alone, in float64; None for what is not floating point."""
    samples = next(leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    found = []
    for i in range(samples):
        y = _call(_double(model, training), pytree.tree_map(_clone, _sample(inputs, i)), spread, seed)
        found.append(pytree.tree_map(lambda t: t.detach() if _is_float(t) else None, y))
    return pytree.tree_map(_cat, found[0], *found[1:], is_leaf=_is_none)


def worst(found: Any, expected: Any) -> float:
    """The largest difference between two trees of blocks, each relative to its block's largest number.

    The trees must have the same structure and shapes.
    """
    mine, my_spec = pytree.tree_flatten(found, is_leaf=_is_none)
    theirs, spec = pytree.tree_flatten(expected, is_leaf=_is_none)
    assert len(mine) == len(theirs), f"{my_spec} against {spec}"
    scales = [float(t.abs().max()) for t in theirs if t is not None and t.numel()]
    largest = max(scales, default=0.0)
    errors = [_relative(a, b, largest) for a, b in zip(mine, theirs, strict=True)]
    return max(errors, default=0.0)


def _relative(a: Tensor | None, b: Tensor | None, largest: float) -> float:
    if a is None or b is None:
        assert a is None, f"{a} against {b}"
        assert b is None, f"{a} against {b}"
        return 0.0
    dense = a.dense() if hasattr(a, "dense") else a
    assert dense.shape == b.shape, f"{tuple(dense.shape)} against {tuple(b.shape)}"
    if b.numel() == 0:
        return 0.0
    scale = max(float(b.abs().max()), SMALL * largest)
    error = float((dense.double() - b).abs().max())
    if math.isnan(error):  # never right, and would be lost in a max
        return float("inf")
    return error / scale if scale else error


def _double(model: Any, training: bool) -> Any:
    if not isinstance(model, nn.Module):
        return model
    twin = copy.deepcopy(model).double().train(training)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


def _sample(inputs: Any, i: int) -> Any:
    def cut(leaf: Any) -> Any:
        part = leaf[i : i + 1].detach().clone()
        # All inputs require gradients, for the old kind of checkpoint forgets its parameters where none does.
        return part.double().requires_grad_() if _is_float(part) else part

    return pytree.tree_map(cut, inputs)


def _one(twin: Any, sample: Any, wrt: Any, spread: bool, seed: int | None) -> Any:
    """One sample: outputs' tree of wrt's tree of `(1, *out, *leaf)`."""
    targets, point = _targets(twin, sample, wrt, spread, seed)
    leaves, wrt_spec = pytree.tree_flatten(targets, is_leaf=_is_none)
    with point:
        # The model may write into what it is given; a leaf that requires a gradient forbids that, a copy does not.
        y = _call(twin, pytree.tree_map(_clone, sample), spread, seed)

    def blocks(out: Any) -> Any:
        if not _is_float(out):
            return None
        rows = [_gradients(number, leaves) for number in out.reshape(-1)]
        stacked = [
            None
            if leaf is None
            else torch.stack([row[j] for row in rows]).reshape((*out.shape[1:], *_own_shape(leaf)))
            if rows
            else torch.zeros((*out.shape[1:], *_own_shape(leaf)), dtype=torch.float64)
            for j, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten([None if s is None else s.unsqueeze(0).detach() for s in stacked], wrt_spec)

    return pytree.tree_map(blocks, y)


def _gradients(number: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    wanted = [leaf for leaf in leaves if leaf is not None]
    for leaf in wanted:
        leaf.grad = None
    if number.requires_grad:
        # `backward` rather than `grad`: reentrant checkpoints allow no other.
        number.backward(retain_graph=True)
    filled = iter(torch.zeros_like(w) if w.grad is None else w.grad for w in wanted)
    return [None if leaf is None else next(filled) for leaf in leaves]


def _own_shape(leaf: Tensor) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, nn.Parameter) else tuple(leaf.shape[1:])


def _targets(twin: Any, sample: Any, wrt: Any, spread: bool, seed: int | None) -> tuple[Any, Any]:
    """The tensors to differentiate with respect to, in the results' structure, and what puts them in place."""
    point: Any = contextlib.nullcontext()
    if isinstance(wrt, list | tuple):
        found: dict[str, Any] = {}
        for one in wrt:
            part, inner = _targets(twin, sample, one, spread, seed)
            found.update(
                part if isinstance(one, str) and isinstance(part, dict) and _is_params(one) else {_key(one): part}
            )
            point = inner if not isinstance(inner, contextlib.nullcontext) else point
        return found, point
    if isinstance(wrt, dict):
        value = _captured(twin, sample, wrt, spread, seed).detach().requires_grad_()
        return value, _replaced(twin, wrt, value)
    if wrt == "inputs" or wrt.startswith("inputs."):
        tree = sample if wrt == "inputs" else sample[_index(twin, sample, wrt.removeprefix("inputs."))]
        return pytree.tree_map(lambda t: t if _is_float(t) else None, tree), point
    parameters = _parameters(twin, wrt)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters, point


def _parameters(twin: nn.Module, glob: str) -> dict[str, Tensor]:
    """By first name; a tied parameter under another name only where that alone was asked for."""
    first = dict(twin.named_parameters())
    if glob == "params":
        return {n: p for n, p in first.items() if _is_float(p)}
    hits = {n: p for n, p in twin.named_parameters(remove_duplicate=False) if fnmatch.fnmatchcase(n, glob)}
    return {n: p for n, p in hits.items() if n in first or not any(q is p and m in first for m, q in hits.items())}


def _is_params(wrt: str) -> bool:
    return wrt != "inputs" and not wrt.startswith("inputs.")


def _key(wrt: Any) -> str:
    return f"{wrt['module']}:{wrt.get('side', 'output')}" if isinstance(wrt, dict) else wrt


def _index(twin: Any, sample: Any, name: str) -> Any:
    """A place in a tuple by its number or by the argument's name, or a key."""
    if not isinstance(sample, tuple | list):
        return name
    names = list(inspect.signature(getattr(twin, "forward", twin)).parameters)
    return names.index(name) if name in names else int(name)


def _captured(twin: nn.Module, sample: Any, wrt: dict[str, str], spread: bool, seed: int | None) -> Tensor:
    kept: list[Tensor] = []
    with _hooked(twin, wrt, lambda value: kept.append(value.clone())):
        _call(twin, pytree.tree_map(_clone, sample), spread, seed)
    return kept[0]


def _replaced(twin: nn.Module, wrt: dict[str, str], value: Tensor) -> Any:
    # A copy, as the rest of the model may write into it.
    return _hooked(twin, wrt, lambda _: value.clone())


@contextlib.contextmanager
def _hooked(twin: nn.Module, wrt: dict[str, str], visit: Any) -> Any:
    module = twin.get_submodule(wrt["module"])

    def after(_module: Any, _args: Any, result: Any) -> Any:
        first = result[0] if isinstance(result, tuple) else result
        value = visit(first)
        return (value, *result[1:]) if isinstance(result, tuple) and value is not None else value

    def before(_module: Any, args: Any) -> Any:
        value = visit(args[0])
        return None if value is None else (value, *args[1:])

    side = wrt.get("side", "output")
    handle = module.register_forward_hook(after) if side == "output" else module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _call(twin: Any, sample: Any, spread: bool, seed: int | None) -> Any:
    if seed is not None:
        torch.manual_seed(seed)
    if spread and isinstance(sample, tuple) and not hasattr(sample, "_fields"):
        return twin(*sample)
    if spread and isinstance(sample, dict):
        return twin(**sample)
    return twin(sample)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _cat(*parts: Any) -> Any:
    return None if parts[0] is None else torch.cat(parts)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_none(value: Any) -> bool:
    return value is None
