"""A caller's model, inputs and request as a message for a service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jacray_workers.errors import InputError, ModelError
from jacray_workers.request import Request
from pydantic import BaseModel
from torch import Tensor
from torch.utils import _pytree as pytree

from jacray.http.messages import Message
from jacray.http.work import DIRECTIONS

Upload = Callable[[Any], str]
"""Sends a module or a file of weights ahead and gives its digest."""


def message_of(model: Any, x: Any, request: Request, upload: Upload) -> Message:
    """The work as a message.

    Args:
        model: a spec, a mapping with the keys of one, or an `nn.Module`.
        x: a tensor or a pytree of tensors, the batch first; an input spec as a mapping with `kind` stays one.
        request: the request.
        upload: sends what travels ahead.

    Raises:
        ModelError: the model cannot travel; the text says what to do.
        InputError: the inputs cannot.
    """
    message = Message()
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
        ModelError: it cannot travel.
    """
    del x
    if isinstance(model, BaseModel):
        model = model.model_dump(mode="json", exclude_none=True)
    if isinstance(model, Mapping):
        spec = dict(model)
        if isinstance(spec.get("weights"), str) and not spec["weights"].startswith("sha256:"):
            spec["weights"] = upload(spec["weights"])
        return spec
    way_out = "describe it as a spec (kind: layers or function), or submit it to a local client"
    raise ModelError("model", "must be a model spec to travel over HTTP", type(model).__name__, way_out)
