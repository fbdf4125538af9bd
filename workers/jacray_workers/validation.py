"""pydantic's complaints in the form of ours: argument, rule, value, way out."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from jacray_workers.errors import Plain, SpecError, UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that proposes the nearest known name, or lists the names where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known names: {', '.join(names)}"


def explain(error: ValidationError, model: Any, prefix: str = "") -> tuple[str, str, Any, str]:
    """The complaint that helps most, as (argument, rule, value, way out).

    pydantic reports every branch of a union. Of the branches at the first place that is wrong, the one that got
    furthest into the value is the one that the user meant; branches that got equally far are told as one rule.

    Args:
        error: what pydantic raised.
        model: the class (or union of classes) that was validated; an unknown key is compared with its fields.
        prefix: put before the argument's dotted path, for models that stand inside a larger document.
    """
    complaints = [_walk(model, raw) for raw in error.errors(include_url=False)]
    start = _misspelled(complaints).path
    rivals = [c for c in complaints if c.path[: len(start)] == start]
    depth = max(len(c.path) for c in rivals)
    furthest = next(c.path for c in rivals if len(c.path) == depth)
    best = [c for c in rivals if c.path == furthest]
    chosen = next((c for c in best if c.type in ("value_error", "extra_forbidden")), best[0])
    argument, rule, value, way_out = chosen.told() if len(best) == 1 or chosen is not best[0] else _together(best)
    path = [*([prefix] if prefix else []), *chosen.path, *([argument] if argument else [])]
    return ".".join(path) or getattr(model, "__name__", "value"), rule, value, way_out


def _misspelled(complaints: Sequence[_Complaint]) -> _Complaint:
    """The first complaint, or the unknown key beside it that is likely the missing one misspelled."""
    first = complaints[0]
    beside = (c for c in complaints if c.type == "extra_forbidden" and c.path[:-1] == first.path[:-1])
    return next(beside, first) if first.type == "missing" else first


@dataclass(frozen=True)
class _Complaint:
    """One of pydantic's complaints.

    Attributes:
        raw: as pydantic tells it.
        path: where, in the user's keys and indices only.
        fields: the names known at the place that holds the last key.
    """

    raw: Any
    path: tuple[str, ...]
    fields: tuple[str, ...]

    @property
    def type(self) -> str:
        return str(self.raw["type"])

    @property
    def phrase(self) -> str:
        """What the value must be, as a phrase that follows `must be`."""
        context = self.raw.get("ctx", {})
        if self.type in _PHRASES:
            return _PHRASES[self.type].format(**context).replace("'", "")
        text = str(self.raw["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
        return text[:1].lower() + text[1:]

    def told(self) -> tuple[str, str, Any, str]:
        """The rest of the argument's path, the rule, the value and the way out."""
        error = self.raw.get("ctx", {}).get("error")
        if isinstance(error, UserError):
            return error.argument, error.rule, error.value, error.way_out
        if self.type == "extra_forbidden":
            return "", "is not a known name", None, nearest(self.path[-1], self.fields)
        if self.type == "missing":
            return "", "is required", None, ""
        return "", f"must be {error or self.phrase}", self.raw.get("input"), self._way_out()

    def _way_out(self) -> str:
        given = self.raw.get("input")
        if self.type != "literal_error" or not isinstance(given, str):
            return ""
        expected = str(self.raw["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(given, expected, n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else ""


_PHRASES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
}


def _together(complaints: Sequence[_Complaint]) -> tuple[str, str, Any, str]:
    """Branches that fail at one place, as one rule."""
    phrases = list(dict.fromkeys(c.phrase for c in complaints))
    if len(phrases) == 1:
        return complaints[0].told()
    return "", f"must be {', '.join(phrases[:-1])} or {phrases[-1]}", complaints[0].raw.get("input"), ""


def _walk(model: Any, raw: Any) -> _Complaint:
    """Follow pydantic's location through the types; what is no key or index names a branch of a union."""
    here, path, fields = _members(model), list[str](), tuple[str, ...]()
    for place, part in enumerate(raw["loc"]):
        models = [m for m in here if _is_model(m)]
        fields = tuple(dict.fromkeys(name for m in models for name in m.model_fields))
        last = place == len(raw["loc"]) - 1
        if isinstance(part, int):
            path.append(str(part))
            here = [inner for m in here for inner in _elements(m)]
        elif part in fields:
            path.append(part)
            here = [
                inner for m in models if part in m.model_fields for inner in _members(m.model_fields[part].annotation)
            ]
        elif part == BY_NAME:
            here = [m for m in here if typing.get_origin(m) is dict]
        elif named := [m for m in models if m.__name__ == part]:
            here = named
        elif typing.get_origin(here[0] if here else None) is dict:
            path.append(str(part))
            here = [inner for m in here for inner in _elements(m)]
        elif last and raw["type"] == "extra_forbidden":
            path.append(str(part))
    return _Complaint(raw, tuple(path), fields)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _members(annotation: Any) -> list[Any]:
    """The branches of a type, without the annotations around them."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for part in typing.get_args(annotation) for inner in _members(part)]
    return [annotation]


def _elements(annotation: Any) -> list[Any]:
    """The types that stand inside a list, tuple or dict."""
    inner = [a for a in typing.get_args(annotation) if a is not Ellipsis]
    return [m for part in inner[-1:] for m in _members(part)]


class ByKind:
    """Marks a union of models that is told apart by the models' `kind`.

    Used as `Annotated[A | B, ByKind()]`. An unknown kind is refused with the list of kinds and the nearest, and
    complaints come from the chosen model alone. A `dict` in the union takes mappings of such models by name: those
    that have no `kind` and hold a mapping.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A tagged union behind a check of the kind."""
        models = [m for m in _members(source) if _is_model(m)]
        by_name = [m for m in _members(source) if not _is_model(m)]
        names = {kind: m.__name__ for m in models for kind in kinds_of(m)}

        def check(value: Any) -> Any:
            if not isinstance(value, tuple(models)) and not (by_name and _holds_mappings(value)):
                _check_kind(value, names)
            return value

        def tag(value: Any) -> str | None:
            if isinstance(value, Mapping):
                return names[value["kind"]] if "kind" in value else BY_NAME
            return type(value).__name__

        choices = {m.__name__: handler.generate_schema(m) for m in models}
        if by_name:
            choices[BY_NAME] = handler.generate_schema(by_name[0])
        return core_schema.no_info_before_validator_function(
            check, core_schema.tagged_union_schema(choices, discriminator=tag)
        )


BY_NAME = "by name"
"""How pydantic's locations call the branch of a union that holds models by name."""


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, Mapping) and "kind" not in value and any(isinstance(v, Mapping) for v in value.values())


def kinds_of(model: Any) -> tuple[str, ...]:
    """The kinds that a model answers to: its `KINDS`, or the literals of its field `kind`."""
    found: tuple[str, ...] = getattr(model, "KINDS", ()) or typing.get_args(model.model_fields["kind"].annotation)
    return found


def _check_kind(value: Any, names: Mapping[str, str]) -> None:
    few = len(names) <= 20
    rule = f"one of {', '.join(names)}" if few else f"one of {len(names)} such as {', '.join([*names][:2])}"
    elsewhere = "" if few else "`jacray schema` lists them"
    if not isinstance(value, Mapping):
        raise SpecError("", f"must be a mapping with a kind: {rule}", value)
    if "kind" not in value:
        raise SpecError("kind", f"is required: {rule}", None, elsewhere)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in names:
        near = nearest(kind, names) if isinstance(kind, str) else ""
        way_out = near if near.startswith("did you mean") else elsewhere
        raise SpecError("kind", f"must be {rule}", Plain(kind) if isinstance(kind, str) else kind, way_out)
