"""What somebody asks for over HTTP, read into models, tensors and a request."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jacray_workers.errors import InputError, RequestError
from jacray_workers.nested import tensor_of
from jacray_workers.request import Request, make_request
from jacray_workers.validation import explain
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from jacray.http import wire
from jacray.http.messages import tensors, tree

DIRECTIONS = ("weights", "vectors")


@dataclass(frozen=True)
class Asked:
    """One piece of work.

    Attributes:
        model: the spec, with the paths that it may read already filled in.
        model_key: what tells models apart.
        inputs: a tensor or a pytree of tensors.
        request: with its directions.
        request_key: what tells requests apart, their directions aside.
        accept: `tensors` or `json`.
        about: the message that it came with.
    """

    model: Mapping[str, Any]
    model_key: str
    inputs: Any
    request: Request
    request_key: str
    accept: str
    about: Mapping[str, Any]


def read_asked(item: Mapping[str, Any], data: Any) -> Asked:
    """One piece of work from its checked JSON and the bytes of its body.

    Args:
        item: `about` is the message, `model` and `model_key` what the parent made of its model, `inputs_file` an
            upload that holds the inputs, `accept` the form of the answer.
        data: the whole body in writable memory, or None where it was JSON.

    Raises:
        UserError: something breaks a rule.
    """
    about = item["about"]
    header = wire.read_header(data) if data is not None else None
    known = tensors(header, data) if header is not None else {}
    fields, key = read_fields(about.get("request", {}))
    inputs, loaded = (
        (read_stored(Path(item["inputs_file"])), None)
        if "inputs_file" in item
        else read_inputs(about.get("inputs"), known, Path("/nonexistent"))
    )
    given = {
        name: read_directions(about["request"][name], known, loaded, name)
        for name in DIRECTIONS
        if about.get("request", {}).get(name) is not None
    }
    request = fields.model_copy(update=given) if given else fields
    return Asked(item["model"], item["model_key"], inputs, request, key, item.get("accept", "tensors"), about)


def without_directions(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields but for the numbers that go with each sample."""
    return {name: value for name, value in request.items() if name not in DIRECTIONS}


def read_fields(request: Mapping[str, Any]) -> tuple[Request, str]:
    """A request without its directions, and what tells it from others.

    Raises:
        RequestError: a field breaks a rule.
    """
    return _fields(wire.dump(without_directions(request)))


@functools.lru_cache(maxsize=1024)
def _fields(text: str) -> tuple[Request, str]:
    """The request that a JSON text stands for, checked once."""
    found = wire.load(text, "request")
    if not isinstance(found, dict):
        raise RequestError("request", "must be a mapping", found)
    return make_request(**found), text


def read_inputs(found: Any, known: Mapping[str, Tensor], base: Path) -> tuple[Any, Any]:
    """The inputs, and what a spec loaded besides them (or None).

    Raises:
        InputError: they are none of tensors of the body, nested lists, an input spec, or a mapping of names to lists.
    """
    if found is None:
        raise InputError("inputs", "are required", None, "give nested lists, an input spec, or tensors of the body")
    if isinstance(found, Mapping) and set(found) == {"tensors"}:
        return tree(found["tensors"], known, "inputs"), None
    if isinstance(found, Mapping) and "kind" in found:
        from jacray_workers import sources
        from jacray_workers.sources.places import Reach

        # The file that the policy let through, and nothing that a step may name besides.
        reach = Reach(tuple(Path(found[key]) for key in ("path",) if key in found), ("file",))
        loaded = sources.load(_input_spec(found), base, reach)
        return loaded.inputs, loaded
    if isinstance(found, Mapping):
        return {name: tensor_of(part, f"inputs.{name}", torch.float32) for name, part in found.items()}, None
    return tensor_of(found, "inputs", torch.float32), None


def read_stored(path: Path) -> Any:
    """The inputs that an upload holds: the tree it describes, its only tensor, or its tensors by name."""
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    header = wire.read_header(memoryview(data))
    known = tensors(header, memoryview(data))
    told = header.about.get("inputs")
    if isinstance(told, Mapping) and set(told) == {"tensors"}:
        return tree(told["tensors"], known, "inputs")
    return next(iter(known.values())) if len(known) == 1 else known


def _input_spec(found: Mapping[str, Any]) -> Any:
    try:
        return _adapter().validate_python(dict(found))
    except ValidationError as error:
        from jacray_workers.sources.specs import InputSpec

        raise InputError(*explain(error, InputSpec, "inputs")) from None


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    from jacray_workers.sources.specs import InputSpec

    return TypeAdapter(InputSpec)


def read_directions(found: Any, known: Mapping[str, Tensor], loaded: Any, argument: str) -> Any:
    """`weights` or `vectors`: tensors of the body, nested lists, a one-hot of a field, or names to these."""
    if isinstance(found, Mapping) and set(found) == {"tensors"}:
        return tree(found["tensors"], known, argument)
    if isinstance(found, Mapping) and "kind" in found:
        return _one_hot(found, loaded, argument)
    if isinstance(found, Mapping):
        return {name: read_directions(part, known, loaded, f"{argument}.{name}") for name, part in found.items()}
    return None if found is None else tensor_of(found, argument)


def _one_hot(found: Mapping[str, Any], loaded: Any, argument: str) -> Any:
    from jacray_workers import sources

    if found["kind"] != "one_hot" or loaded is None:
        rule = "must be tensors, nested lists, or a one_hot of a field of the inputs"
        raise RequestError(argument, rule, found["kind"])
    return sources.directions(found, loaded, Path("/nonexistent"), functools.partial(_no_classes, argument), argument)


def _no_classes(argument: str) -> int:
    raise RequestError(f"{argument}.classes", "is required over HTTP", None, "say how many outputs the model has")
