"""pydantic's complaints in the form of ours: argument, rule, value, way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that proposes the nearest known name, or lists the names where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known names: {', '.join(names)}"


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> tuple[str, str, Any, str]:
    """The first complaint as (argument, rule, value, way out).

    Args:
        error: what pydantic raised.
        model: the class that was validated; its fields are what an unknown key is compared with.
        prefix: put before the argument's dotted path, for models that stand inside a larger document.
    """
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    argument = ".".join([*([prefix] if prefix else []), *_visible(path)]) or prefix or model.__name__
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        return argument, "is not a known name", None, nearest(path[-1], _fields_at(model, path[:-1]))
    if first["type"] == "missing":
        return argument, "is required", None, ""
    return argument, _rule(first), value, _way_out(first)


def _rule(complaint: Any) -> str:
    context = complaint.get("ctx", {})
    if complaint["type"] == "literal_error":
        return f"must be one of {str(context['expected']).replace(chr(39), '')}"
    if complaint["type"] == "value_error":
        return f"must be {context['error']}"
    text: str = complaint["msg"]
    return text[0].lower() + text[1:].replace("Input should", "should")


def _way_out(complaint: Any) -> str:
    if complaint["type"] == "literal_error" and isinstance(complaint.get("input"), str):
        expected = str(complaint["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(complaint["input"], expected, n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else ""
    return ""


def _visible(path: list[str]) -> list[str]:
    """The path without the branch names that pydantic adds for unions."""
    noise = ("function-", "tagged-union", "tuple[", "list[", "constrained-", "is-instance[", "lax-or-strict")
    return [part for part in path if not part.startswith(noise) and part not in _TYPE_NAMES]


_TYPE_NAMES = {"str", "int", "float", "bool", "ModulePoint", "dict", "list", "tuple"}


def _fields_at(model: type[BaseModel], path: list[str]) -> Iterable[str]:
    """The field names of the model found by following the path through nested models."""
    here: Any = model
    for part in path:
        if not (isinstance(here, type) and issubclass(here, BaseModel)) or part not in here.model_fields:
            break
        annotation = here.model_fields[part].annotation
        here = annotation if isinstance(annotation, type) else here
    return here.model_fields if isinstance(here, type) and issubclass(here, BaseModel) else model.model_fields
