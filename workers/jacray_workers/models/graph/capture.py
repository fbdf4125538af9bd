"""From any module that `torch.export` captures to a graph."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError, Plain, shorten
from jacray_workers.models.graph.batch import SIZES, Draft, Unlike, unify, without_marks
from jacray_workers.models.graph.binding import steps
from jacray_workers.models.graph.convert import Converter, Named
from jacray_workers.models.graph.document import Document
from jacray_workers.models.graph.file import stored
from jacray_workers.models.graph.values import Ref
from jacray_workers.problem.problem import CallableModule, as_module
from jacray_workers.problem.session import session
from jacray_workers.problem.state import kept
from jacray_workers.problem.trees import arguments
from jacray_workers.validation import explain


def capture(model: Any, example: Any) -> tuple[Document, dict[str, Tensor]]:
    """The graph of a module and its tensors.

    The module runs under `torch.export` twice: with marks where values enter and leave its submodules, and without.
    Where the two differ in anything but the marks, as where a caller sees what a submodule wrote in place, the graph is
    kept without them. A module whose batch size torch.export takes for a constant (`len(x)` does that) is captured with
    three batch sizes instead, and what grows with them is made an expression of the batch.

    Raises:
        ModelError: torch.export cannot capture the module, or it calls what graph files do not hold.
        InputError: the example is no batch of tensors.
    """
    module = as_module(model)
    target = module.function if isinstance(module, CallableModule) else module
    call, leaves = arguments(target, example)
    named = Named.of(module)
    with session(module, training=False, tf32=False, seed=0):
        signature = _signature(target)
        args, kwargs = call.bind(leaves)
        entries = _inputs(signature, args, kwargs, leaves)
        found = _captured(module, call, leaves, named)
    document = {
        "version": 1,
        "modules": [name for name, _ in module.named_modules() if name],
        "state": found.state,
        "signature": [_parameter(p) for p in signature.parameters.values()],
        "inputs": entries,
        "nodes": found.nodes,
        "output": found.output,
    }
    try:
        return Document.model_validate(document), {name: stored(tensor) for name, tensor in found.tensors.items()}
    except ValidationError as error:
        raise ModelError(*explain(error, Document, "model")) from None


def _captured(module: nn.Module, call: Any, leaves: list[Tensor], named: Named) -> Draft:
    """The graph with as many marks as leave its calls what they are."""
    try:
        capture: Any = functools.partial(_free, module, call, leaves, named)
        plain: Draft = capture(())
    except ModelError as refused:
        capture = functools.partial(_from_sizes, module, call, leaves, named)
        try:
            plain = capture(())
        except Unlike as unlike:
            raise refused if unlike.reason is None else unlike.reason from None
        except ModelError:
            raise refused from None
    for sides in (("enter", "leave"), ("leave",)):
        with contextlib.suppress(ModelError, Unlike):
            marked: Draft = capture(sides)
            if without_marks(marked, len(leaves)) == without_marks(plain, len(leaves)):
                return marked
    return plain


def _free(module: nn.Module, call: Any, leaves: list[Tensor], named: Named, sides: Sequence[str]) -> Draft:
    """With a batch size that torch.export keeps free."""
    dim = torch.export.Dim("batch", min=1, max=2**31)
    return _converted(module, call, _samples(leaves, 2), named, {"leaves": tuple({0: dim} for _ in leaves)}, sides)


def _from_sizes(module: nn.Module, call: Any, leaves: list[Tensor], named: Named, sides: Sequence[str]) -> Draft:
    """From three captures with three fixed batch sizes: what grows with the batch becomes an expression of it."""
    drafts = [_converted(module, call, _samples(leaves, size), named, None, sides) for size in SIZES]
    return unify(drafts, len(leaves))


def _samples(leaves: list[Tensor], size: int) -> list[Tensor]:
    return [torch.cat([leaf.detach()] * size)[:size].clone() for leaf in leaves]


class _Seen:
    """What the traced call showed; an object of its own, since torch.export undoes changes of a module's attributes."""

    tree: Any = None


class _Flat(nn.Module):
    """The module with its tensors as positional arguments, and its output as a flat tuple of tensors."""

    def __init__(self, inner: nn.Module, call: Any, seen: _Seen) -> None:
        super().__init__()
        self.inner = inner
        self.call = call
        self.seen = seen

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.call.bind(leaves)
        found: list[Tensor] = []
        self.seen.tree = _tree(self.inner(*args, **kwargs), found)
        return tuple(found)


def _converted(
    module: nn.Module, call: Any, leaves: list[Tensor], named: Named, shapes: Any, sides: Sequence[str]
) -> Draft:
    seen = _Seen()
    flat = _Flat(module, call, seen)
    flat.training = False
    try:
        # What a module keeps from a call is made of the tracer's tensors here, and must not stay with its owner.
        with kept(module, deep=True), _marked(module, sides), _no_custom_backward(), _silence():
            program = torch.export.export(flat, tuple(leaves), dynamic_shapes=shapes, strict=False)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - torch.export raises whatever the model or the tracer raises
        raise _refusal(error, module) from None
    return Converter(program, len(leaves), seen.tree, named).draft


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch.export prints whole graphs where it fails; what matters becomes one error of ours."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_custom_backward() -> Iterator[None]:
    """A graph holds what forward computes, so a backward that somebody wrote would be lost without a word.

    Raises:
        ModelError: inside, where such a function is called.
    """
    home = torch.autograd.Function
    before = home.__dict__["apply"]

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch.") and "checkpoint" not in cls.__module__:
            return before.__func__(cls, *args, **kwargs)
        way_out = "write it with torch operators, or keep to your own process or Ray, which take any module"
        raise ModelError(
            "model", "uses an autograd.Function, whose backward a graph cannot hold", cls.__name__, way_out
        )

    home.apply = classmethod(refuse)  # type: ignore[assignment]
    try:
        yield
    finally:
        home.apply = before  # type: ignore[method-assign]


def _refusal(error: Exception, module: nn.Module) -> ModelError:
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    why = shorten(Plain(f"{type(error).__name__}: {first.partition(' For more information')[0]}"), 300)
    way_out = "describe it as a model spec (import, layers), or keep to your own process or Ray, which take any module"
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        way_out = "replace branches on data by torch.where, and .item() by tensors"
    elif "batch" in text and "Constraint" in text:
        why = "its code takes the batch size for a constant"
        way_out = "let its code take the batch size from x.shape[0], without int(), len() or a loop over samples"
    return ModelError(
        "model", f"must be a module that torch.export captures, but: {why}", type(module).__name__, way_out
    )


def _tree(value: Any, found: list[Tensor]) -> Any:
    """The output's structure as a graph file has it, with numbers in the place of tensors."""
    if isinstance(value, Tensor):
        found.append(value)
        return Ref(len(found) - 1)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[k if isinstance(k, int) else str(k), _tree(v, found)] for k, v in value.items()]}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        tag = "list" if isinstance(value, list) else "tuple"
        return {tag: [_tree(part, found) for part in value]}
    inner, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    if len(inner) == 1 and inner[0][1] is value:
        raise ModelError("model", "must return tensors in lists, tuples, dicts and the like", type(value).__name__)
    return {"dict": [[steps(path)[0], _tree(part, found)] for path, part in inner]}


def _signature(target: Any) -> inspect.Signature:
    try:
        found = inspect.signature(target.forward if isinstance(target, nn.Module) else target)
    except (TypeError, ValueError):
        found = inspect.signature(lambda *args, **kwargs: None)  # noqa: ARG005 - what is not known takes everything
    return found


def _parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "kind": parameter.kind.name,
        "optional": parameter.default is not inspect.Parameter.empty,
    }


def _inputs(signature: inspect.Signature, args: Any, kwargs: Any, leaves: list[Tensor]) -> list[dict[str, Any]]:
    """Where each tensor stands among the arguments, in the order of the leaves."""
    bound = signature.bind(*args, **kwargs).arguments
    places = {id(leaf): steps(path) for path, leaf in pytree.tree_flatten_with_path(dict(bound))[0]}
    return [{"path": places[id(leaf)], "dtype": str(leaf.dtype)[6:], "shape": list(leaf.shape[1:])} for leaf in leaves]


@contextlib.contextmanager
def _marked(module: nn.Module, sides: Sequence[str]) -> Iterator[None]:
    """Let every submodule mark the first tensor that enters and leaves it."""
    handles = []
    for name, part in module.named_modules():
        if name and sides and not isinstance(part, torch.jit.ScriptModule):
            if "enter" in sides:
                handles.append(part.register_forward_pre_hook(functools.partial(_enters, name), with_kwargs=True))
            handles.append(part.register_forward_hook(functools.partial(_leaves, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enters(name: str, _module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _mark((args, kwargs), f"enter {name}")


def _leaves(name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
    return _mark(output, f"leave {name}")


def _mark(passing: Any, text: str) -> Any:
    """The same with the first tensor marked, wherever it stands: attention tells self from cross by identity."""
    found, spec = pytree.tree_flatten(passing)
    first = next((leaf for leaf in found if isinstance(leaf, Tensor)), None)
    if first is None:
        return None
    marked = _mark_operator()(first, text)
    return pytree.tree_unflatten([marked if leaf is first else leaf for leaf in found], spec)


@functools.cache
def _mark_operator() -> Any:
    """An operator that passes a tensor on, and whose call carries a name through torch.export."""
    _LIBRARY.append(torch.library.Library("jacray", "FRAGMENT"))
    _LIBRARY[0].define("mark(Tensor x, str text) -> Tensor")
    _LIBRARY[0].impl("mark", lambda x, text: x.clone(), "CompositeExplicitAutograd")  # noqa: ARG005 - the schema's names
    torch.library.register_fake("jacray::mark", lambda x, text: torch.empty_like(x), lib=_LIBRARY[0])  # noqa: ARG005
    return torch.ops.jacray.mark.default


_LIBRARY: list[torch.library.Library] = []  # torch forgets an operator when its library is collected
