"""A caller's model, inputs and request as a message for a service."""

from __future__ import annotations

import contextlib
import functools
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jacray_workers.errors import InputError, ModelError, Plain
from jacray_workers.request import Request
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray.http.messages import Message, raw
from jacray.http.work import DIRECTIONS

Upload = Callable[[Callable[[], bytes]], str]
"""Sends bytes ahead and gives their digest."""


def message_of(model: Any, x: Any, request: Request, upload: Upload, more: Mapping[str, Any] | None = None) -> Message:
    """The work as a message.

    Args:
        model: a spec, a mapping with the keys of one, or an `nn.Module`.
        x: a tensor or a pytree of tensors, the batch first; an input spec as a mapping with `kind` stays one.
        request: the request.
        upload: sends what travels ahead.
        more: what else the message says.

    Raises:
        ModelError: the model cannot travel; the text says what to do.
        InputError: the inputs cannot.
    """
    message = Message(dict(more or {}))
    message.about["inputs"] = inputs_of(x, message)
    message.about["request"] = request_of(request, message)
    message.about["model"] = model_of(model, x, upload)
    return message


def inputs_of(x: Any, message: Message) -> Any:
    """The inputs, or the spec or digest that stands for them."""
    if isinstance(x, BaseModel):
        x = x.model_dump(mode="json")
    if isinstance(x, Mapping) and ("kind" in x or set(x) == {"digest"}) and _is_spec(x):
        return dict(x)
    if isinstance(x, list) and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x)):
        try:
            x = torch.tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError("inputs", f"must be numbers in evenly nested lists: {error}", x) from None
    return message.put(x, "inputs")


def _is_spec(x: Mapping[str, Any]) -> bool:
    return isinstance(x.get("kind", x.get("digest")), str)


def request_of(request: Request, message: Message) -> dict[str, Any]:
    """The fields that were set, as JSON data; directions that are tensors come along."""
    found: dict[str, Any] = {}
    for name in sorted(request.model_fields_set):
        value = getattr(request, name)
        if name in DIRECTIONS:
            found[name] = _direction(value, name, message)
        else:
            found[name] = _plain(value)
    return found


def _direction(value: Any, name: str, message: Message) -> Any:
    leaves = pytree.tree_leaves(value)
    if value is None or (isinstance(value, Mapping) and "kind" in value):
        return value
    if not any(isinstance(leaf, Tensor) or hasattr(leaf, "__array__") for leaf in leaves):
        return _plain(value)
    return message.put(value, name)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def model_of(model: Any, x: Any, upload: Upload) -> dict[str, Any]:
    """The model's spec, or the digest of what was sent ahead.

    Raises:
        ModelError: it cannot travel; the text says what to do.
    """
    if isinstance(model, BaseModel):
        model = model.model_dump(mode="json", exclude_none=True)
    if isinstance(model, Mapping) and not callable(model):
        spec = dict(model)
        for name in ("weights", *(("path",) if spec.get("kind") == "graph" else ())):
            if isinstance(spec.get(name), str) and not spec[name].startswith("sha256:"):
                spec[name] = upload(functools.partial(_read, spec[name], f"model.{name}"))
        return spec
    return {"digest": exported(model, x, upload)}


def _read(path: str, argument: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ModelError(argument, f"must name a file that can be read: {error.strerror}", Plain(path)) from None


_exported: weakref.WeakKeyDictionary[Any, dict[Any, bytes]] = weakref.WeakKeyDictionary()


def exported(model: Any, x: Any, upload: Upload) -> str:
    """The digest of a module that was sent ahead as a graph file: its graph and its weights, and nothing to unpickle.

    Raises:
        ModelError: it cannot be exported; the text says what to do.
    """
    from jacray_workers.models import graph
    from jacray_workers.problem.problem import as_module

    if isinstance(x, Mapping) and _is_spec(x):
        way_out = "give the inputs as tensors, or the model as a spec or a graph file (jacray.export)"
        raise ModelError("model", "needs example inputs to be exported", type(model).__name__, way_out)
    key = _state_of(model, x)
    known = _exported.setdefault(model, {}) if key is not None else {}
    if key not in known:
        known.clear()
        with _evaluating(as_module(model)) as module:
            known[key] = graph.dump(module, _tensors(x))
    return upload(lambda: known[key])


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, which is how it is differentiated; its modes come back as they were."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training


def _state_of(model: Any, x: Any) -> Any:
    """Everything that decides what is exported: the module's make-up, its numbers, and the shapes of one sample."""
    from jacray_workers.problem import cache

    one = pytree.tree_map_only(Tensor, lambda leaf: leaf[:1], x)
    key = cache.key_of(model, one, Request(), (1, False))
    if key is None:
        return None
    numbers = 0
    for tensor in (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ():
        numbers = zlib.crc32(raw(tensor), numbers)
    return key.parts, numbers


def _tensors(x: Any) -> Any:
    return torch.tensor(x) if isinstance(x, list) and not any(isinstance(t, Tensor) for t in x) else x
