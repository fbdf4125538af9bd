"""From what a user typed to a `Problem`: names are resolved, shapes are probed, mistakes are refused."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import CoupledSamplesError, InputError, JacrayError, ModelError, Plain, RequestError
from jacray_workers.problem.points import find_module
from jacray_workers.problem.problem import CallableModule, Leaf, Out, Problem, as_module
from jacray_workers.problem.session import Draws, lock_of
from jacray_workers.problem.state import Snapshot, Writes, modules_of, scripted
from jacray_workers.problem.trees import arguments
from jacray_workers.request import ModulePoint, Request
from jacray_workers.validation import nearest

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def resolve(model: Any, inputs: Any, request: Request) -> tuple[Problem, list[Tensor]]:
    """Make the problem, and the input leaves as tensors where the caller put them (not moved, not cast).

    One sample is run through the model to learn the shapes of its outputs.

    Raises:
        InputError, ModelError, RequestError: naming the argument, the rule, the value and the way out.
    """
    module = as_module(model)
    call, leaves = arguments(module.function if isinstance(module, CallableModule) else module, inputs)
    if "inputs" in request.wrt_list and not any(leaf.dtype in _FLOATS for leaf in leaves):
        raise _integer(module, "inputs", leaves[0])
    device = pick_device(request.device, module, leaves)
    cast = None if request.dtype is None else getattr(torch, request.dtype)
    point = request.outputs if isinstance(request.outputs, ModulePoint) else _point(request.outputs)
    if point is not None:
        find_module(module, point.module, "outputs")
    problem = Problem(
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
    with problem.session():
        batch = [leaf.clone() for leaf in place(problem, [leaf[:1] for leaf in leaves])]
        y, problem = _watched(problem, batch)
        random = request.training or problem.random
        # From here on a model that writes into what it is given is given copies: the caller's tensors stay whole.
        problem = replace(problem, writes=_written(batch))
        batch = place(problem, [leaf[:1] for leaf in leaves])
        outs, out_tree, out_notes = _outs(y, None if point else request.outputs, leaves[0].shape[0])
        wrt, wrt_tree, wrt_notes = _leaves(problem, batch, request)
        writes = problem.writes or _writes_hidden(replace(problem, leaves=wrt), batch)
    kept = functools.reduce(torch.promote_types, [out.dtype for out in outs])
    rows = sum(len(out.rows) for out in outs)
    notes = (*out_notes, *wrt_notes)
    resolved = replace(
        problem,
        leaves=wrt,
        outs=outs,
        rows=rows,
        dtype=kept,
        wrt_tree=wrt_tree,
        out_tree=out_tree,
        random=random,
        writes=writes,
        notes=notes,
    )
    return resolved, leaves


def _written(tensors: Sequence[Tensor]) -> bool:
    """Whether any of these fresh tensors was written to."""
    return any(tensor._version > 0 for tensor in tensors)


def _writes_hidden(problem: Problem, batch: Sequence[Tensor]) -> bool:
    """Whether the model writes into a hidden value that is put in place, as an in-place activation after it does."""
    if not any(leaf.side == "module" for leaf in problem.leaves):
        return False
    values = [value.clone() for value in problem.values(batch)]
    with torch.no_grad():
        problem.call_model(values, batch)
    return _written(values)


def run_model(problem: Problem, batch: Sequence[Tensor]) -> Any:
    """Call the model; what it raises becomes a `ModelError` that keeps the cause.

    Raises:
        ModelError: the model raised.
    """
    try:
        return problem.call_model(problem.values(batch), batch)
    except JacrayError:
        raise
    except Exception as error:
        raise _does_not_run(problem, batch, error) from error


def _watched(problem: Problem, batch: Sequence[Tensor]) -> tuple[Any, Problem]:
    """What the model returns on its first run, and the problem with what the run showed of the model's habits."""
    own = {**dict(problem.module.named_parameters()), **dict(problem.module.named_buffers()), **problem.tensors}
    versions = {name: tensor._version for name, tensor in own.items() if not tensor.is_inference()}
    before, draws, writes = Snapshot(problem.module, deep=True), Draws(), Writes(own)
    try:
        with writes:
            y, differentiates = _first_run(replace(problem, stateful=False), batch)
        stateful, random = before.changed(), draws.happened()
    finally:
        before.restore()
        # Some operators write without saying so; those that do so into parameters say so.
        seen = [name for name, version in versions.items() if own[name]._version != version]
        writes.undo()
    written = tuple(sorted({*writes.saved, *seen} - scripted(problem.module)))
    return y, replace(
        problem,
        differentiates=differentiates,
        stateful=stateful,
        random=random,
        written=written,
        branches=writes.branches,
    )


def _first_run(problem: Problem, batch: Sequence[Tensor]) -> tuple[Any, bool]:
    """What the model returns, and whether it needs gradients on, as one that takes derivatives itself does."""
    with torch.no_grad():
        try:
            return run_model(problem, batch), False
        except ModelError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
    return run_model(problem, batch), True


def _does_not_run(problem: Problem, batch: Sequence[Tensor], error: Exception) -> ModelError:
    text = str(error)
    if "Expected more than 1 value per channel" in text:
        return _batch_statistics(problem.module, problem.training)
    shapes = ", ".join(f"{tuple(leaf.shape)} {str(leaf.dtype)[6:]}" for leaf in batch)
    casts = "dtype" in text or "expected scalar type" in text or "Double" in text
    hint = "set dtype='float32' (or 'float64') to cast the model and the inputs alike" if casts else ""
    rule = f"must accept the inputs, but raised {type(error).__name__}: {error}"
    return ModelError("model", rule, f"a batch of {shapes}", hint)


def _batch_statistics(module: nn.Module, training: bool) -> CoupledSamplesError:
    """Batch norm over the batch's own statistics refuses a single sample; the first such layer is named."""
    norms = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (training or part.running_mean is None)
    ]
    rule = "must treat the samples of a batch apart, but batch norm {} takes its statistics from all"
    way_out = "put a norm over each sample in its place"
    if training:
        rule, way_out = (
            rule.format("in training mode"),
            f"leave training=False, for its running statistics, or {way_out}",
        )
    else:
        rule = rule.format("without running statistics")
    return CoupledSamplesError("model", rule, Plain(f"module {norms[0]}") if norms else None, way_out)


def place(problem: Problem, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The batch on the problem's device, float leaves in the request's precision; nothing is copied needlessly."""
    placed = []
    for leaf in leaves:
        dtype = problem.cast if leaf.is_floating_point() else None
        moved = leaf.detach().to(device=problem.device, dtype=dtype, non_blocking=True)
        # A tensor made under inference_mode cannot be saved for backward.
        placed.append(moved.clone() if moved.is_inference() else moved)
    return placed


def pick_device(device: str, module: nn.Module, leaves: Sequence[Tensor]) -> torch.device:
    """The device named, or for `auto` the one the model or inputs are on, or the first GPU where there is one.

    Raises:
        RequestError: there is no such device here.
    """
    if device == "auto":
        tensors = [*module.parameters(), *module.buffers(), *leaves]
        found = next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), None)
        return found or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise RequestError("device", "must be auto, cpu, cuda or cuda:INDEX", device) from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise RequestError("device", f"this machine has {torch.cuda.device_count()} GPUs", device, "use auto or cpu")
    return torch.device("cuda", picked.index or 0) if picked.type == "cuda" else picked


def moved(module: nn.Module, device: torch.device, cast: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters and buffers that must be used in place of the module's own: moved, cast, or shielded from writes.

    In training mode buffers such as running statistics are written to, so copies take the writes.
    """
    swapped: dict[str, Tensor] = {}
    # What is made under the caller's inference mode, tensors of the module included, cannot take part in derivatives.
    # The lock: in another thread's session the module may hold other tensors in its parameters' places.
    with torch.inference_mode(mode=False), lock_of(module):
        if _as_they_are(module, device, cast):
            return swapped
        for name, tensor in module.named_parameters():
            dtype = cast if tensor.is_floating_point() else None
            if tensor.is_inference() or tensor.device != device or dtype not in (None, tensor.dtype):
                made = tensor.detach().to(device=device, dtype=dtype)
                swapped[name] = made.clone() if made.is_inference() else made
        fixed = scripted(module)
        for name, buffer in module.named_buffers():
            made = buffer.detach().to(device=device, dtype=cast if buffer.is_floating_point() else None)
            alike = made.dtype == buffer.dtype and made.device == buffer.device
            if name not in fixed or not alike or made.is_inference():
                swapped[name] = made.clone() if alike else made
    stuck = sorted(fixed.intersection(swapped))
    if stuck:
        rule = "is scripted, so its tensors cannot be cast or moved by jacray"
        raise ModelError(
            "model", rule, Plain(stuck[0]), "cast or move the module itself first, or pass the unscripted one"
        )
    return swapped


def _as_they_are(module: nn.Module, device: torch.device, cast: torch.dtype | None) -> bool:
    """Whether a module has no buffers, and parameters that need no change: the walk by names is slow."""
    parts = modules_of(module)
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    return not any(part._buffers for part in parts) and all(
        p.device == device and not p.is_inference() and (cast in (None, p.dtype) or not p.is_floating_point())
        for p in parameters
    )


def _point(outputs: Any) -> ModulePoint | None:
    if isinstance(outputs, Mapping) and "module" in outputs:
        try:
            return ModulePoint.model_validate(dict(outputs))
        except ValueError:
            raise RequestError("outputs", "must be {module: NAME, side: input | output}", dict(outputs)) from None
    return None


def _outs(y: Any, choice: Any, samples: int) -> tuple[tuple[Out, ...], Any, list[str]]:
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
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
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
    floats = [i for i, leaf in enumerate(found) if isinstance(leaf, Tensor) and leaf.dtype in _FLOATS]
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


def _leaves(problem: Problem, batch: Sequence[Tensor], request: Request) -> tuple[tuple[Leaf, ...], Any, list[str]]:
    """Resolve `wrt` to leaves and to the structure that results have."""
    finder = _Finder(problem, batch)
    trees: dict[str, Any] = {}
    for target in request.wrt_list:
        trees.update(finder.find(target))
    if isinstance(request.wrt, tuple) or len(trees) > 1 or finder.named:
        return tuple(finder.leaves), trees, finder.notes
    return tuple(finder.leaves), next(iter(trees.values())), finder.notes


def _integer(module: nn.Module, argument: str, tensor: Tensor) -> InputError:
    tables = [name for name, part in module.named_modules() if isinstance(part, nn.Embedding)]
    way_out = "cast it to a float type if it is a quantity"
    if tables:
        way_out = f"differentiate where the tokens become vectors: wrt={{'module': '{tables[0]}', 'side': 'output'}}"
    return InputError(argument, "must be floating point to be differentiated", str(tensor.dtype)[6:], way_out)


class _Finder:
    """Collects the leaves of several targets; one leaf stands for a tensor named twice."""

    def __init__(self, problem: Problem, batch: Sequence[Tensor]) -> None:
        self.problem, self.batch = problem, batch
        self.leaves: list[Leaf] = []
        self.notes: list[str] = []
        self.named = False

    def find(self, target: str | ModulePoint) -> dict[str, Any]:
        if isinstance(target, ModulePoint):
            return {target.key: self._module(target)}
        if target == "inputs":
            return {"inputs": self._inputs()}
        if target.startswith("inputs."):
            return {target: self._input(target)}
        self.named = True
        return self._params(target)

    def _add(self, leaf: Leaf) -> int:
        for i, known in enumerate(self.leaves):
            if (known.side, known.index, known.name, known.key if leaf.side == "module" else "") == (
                leaf.side,
                leaf.index,
                leaf.name,
                leaf.key if leaf.side == "module" else "",
            ):
                return i
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def _inputs(self) -> Any:
        slots: list[int | None] = []
        for index, name in enumerate(self.problem.call.names):
            key = f"inputs.{name}" if name else "inputs"
            slots.append(self._add(self._input_leaf(index, key)) if self._is_float(index) else None)
        if all(slot is None for slot in slots):
            raise _integer(self.problem.module, "inputs", self.batch[0])
        return pytree.tree_unflatten(slots, self.problem.call.spec)

    def _input(self, target: str) -> int:
        names = self.problem.call.names
        index = self.problem.call.index(target.removeprefix("inputs."))
        if index is None:
            way_out = (
                nearest(target, [f"inputs.{n}" for n in names])
                if any(names)
                else "the input is one bare tensor: use inputs"
            )
            raise RequestError("wrt", "names no input", target, way_out)
        if not self._is_float(index):
            raise _integer(self.problem.module, target, self.batch[index])
        return self._add(self._input_leaf(index, target))

    def _input_leaf(self, index: int, key: str) -> Leaf:
        tensor = self.batch[index]
        return Leaf(key, "input", tuple(tensor.shape[1:]), tensor.dtype, index=index)

    def _is_float(self, index: int) -> bool:
        return self.batch[index].dtype in _FLOATS

    def _params(self, pattern: str) -> dict[str, Any]:
        module = self.problem.module
        fixed = scripted(module)
        canonical = {id(p): name for name, p in module.named_parameters()}
        everything = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if p.dtype in _FLOATS]
        if not everything:
            raise RequestError(
                "wrt", "the model has no parameters", pattern, "use wrt='inputs', or pass the nn.Module itself"
            )
        if pattern == "params":
            chosen = [(n, p) for n, p in everything if canonical[id(p)] == n]
        else:
            hits = [(n, p) for n, p in everything if fnmatch.fnmatchcase(n, pattern)]
            names = {n for n, _ in hits}
            # A tied parameter goes by its first name unless only another name was asked for.
            chosen = [(n, p) for n, p in hits if canonical[id(p)] == n or canonical[id(p)] not in names]
        if fixed.intersection(n for n, _ in chosen):
            rule = "names parameters of a scripted module, in whose places no other values can be put"
            raise RequestError("wrt", rule, pattern, "pass the unscripted module")
        if not chosen:
            raise RequestError(
                "wrt",
                "is neither inputs nor a glob that matches a parameter",
                pattern,
                nearest(pattern, ["inputs", "params", *(n for n, _ in everything)]),
            )
        tensors = self.problem.tensors
        found = {}
        for name, parameter in chosen:
            own = canonical[id(parameter)]
            dtype = tensors.get(own, parameter).dtype
            found[name] = self._add(Leaf(name, "param", tuple(parameter.shape), dtype, name=own))
        return found

    def _module(self, point: ModulePoint) -> int:
        find_module(self.problem.module, point.module, "wrt")
        probe = Leaf(point.key, "module", (), torch.float32, name=point.module)
        value = replace(self.problem, leaves=(probe,)).values(self.batch)[0]
        if value.dtype not in _FLOATS:
            raise RequestError(
                "wrt", "must name a point where floating-point values pass", f"{point.key}: {value.dtype}"
            )
        if value.dim() == 0 or value.shape[0] != 1:
            raise RequestError(
                "wrt",
                "must name a point with the batch as its first axis",
                f"{point.key}: shape {tuple(value.shape)} for a batch of one",
            )
        return self._add(replace(probe, shape=tuple(value.shape[1:]), dtype=value.dtype))
