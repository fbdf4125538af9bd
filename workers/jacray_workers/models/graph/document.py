"""What the metadata of a graph file holds, as checked and frozen data."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from jacray_workers.errors import ModelError, Plain, SpecError
from jacray_workers.spec_parts import Spec
from jacray_workers.validation import explain

MAX_NODES = 200_000
MAX_NAMES = 100_000
MAX_DEPTH = 60


def _usable(name: str) -> str:
    parts = name.split(".")
    if len(parts) > MAX_DEPTH or not name.isprintable():
        raise SpecError("", f"must be printable names joined by at most {MAX_DEPTH - 1} dots", name)
    if any(not part or part.startswith("__") for part in parts):
        raise SpecError("", "must be names that are not empty and do not start with two underscores", name)
    return name


Name = Annotated[str, Field(strict=True, min_length=1, max_length=2_000), AfterValidator(_usable)]
Dtype = Literal["float64", "float32", "bfloat16", "float16", "complex128", "complex64",
                "int64", "int32", "int16", "int8", "uint8", "bool"]  # fmt: skip
Kind = Literal["POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"]
Length = Annotated[int, Field(strict=True, ge=0, le=2**31)]
Flag = Annotated[bool, Field(strict=True)]
Step = Annotated[str | Annotated[int, Field(strict=True)], Field(union_mode="left_to_right")]


class StateEntry(Spec):
    """A tensor of the model, under all its names; the file holds it under the first."""

    names: tuple[Name, ...] = Field(min_length=1, max_length=MAX_NAMES)
    kind: Literal["parameter", "buffer"]
    persistent: Flag = True
    trains: Flag = True
    pairs: Flag = Field(default=False, description="a complex tensor, stored as pairs of real numbers")


class InputEntry(Spec):
    """One tensor of a call: where it stands among the arguments, and one sample's shape."""

    path: tuple[Step, ...] = Field(min_length=1, max_length=MAX_DEPTH)
    dtype: Dtype
    shape: tuple[Length, ...] = Field(max_length=32)


class Parameter(Spec):
    """One parameter of the model's signature."""

    name: str = Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)
    kind: Kind = "POSITIONAL_OR_KEYWORD"
    optional: Flag = False


class Document(Spec):
    """A graph.

    Attributes:
        modules: names of the submodules, parents first.
        state: parameters and buffers.
        signature: of the model's `forward`.
        inputs: the tensors of a call, in the order of their numbers.
        nodes: calls `[operator, arguments, keywords]`; the value of each has the next number. `["enter", module, v]`
            and `["leave", module, v]` frame what ran inside a submodule and pass a value on; `["output", module, v]` is
            a submodule's output alone.
        output: nested `{"list": [...]}`, `{"tuple": [...]}` and `{"dict": [[key, ...], ...]}` around values.
    """

    version: Literal[1]
    modules: tuple[Name, ...] = Field(max_length=MAX_NAMES)
    state: tuple[StateEntry, ...] = Field(max_length=MAX_NAMES)
    signature: tuple[Parameter, ...] = Field(max_length=1_000)
    inputs: tuple[InputEntry, ...] = Field(min_length=1, max_length=1_000)
    nodes: tuple[tuple[Any, Any, Any], ...] = Field(max_length=MAX_NODES)
    output: Any

    @model_validator(mode="after")
    def _names_stand_once(self) -> Document:
        given = [*self.modules, *(name for entry in self.state for name in entry.names)]
        if len({*given}) != len(given):
            raise SpecError("state", "must give each name to one submodule, parameter or buffer", _twice(given))
        if len({entry.path for entry in self.inputs}) != len(self.inputs):
            raise SpecError("inputs", "must stand in different places", len(self.inputs))
        return self


def _twice(names: list[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


def parse(text: str) -> Document:
    """The document that a text holds.

    Raises:
        ModelError: it is no JSON, a key stands twice, or a rule is broken.
    """
    data = strict_json(text, "the graph")
    try:
        return Document.model_validate(data)
    except ValidationError as error:
        argument, rule, value, way_out = explain(error, Document)
        raise ModelError("model", f"has a graph whose {argument} {rule}", value, way_out) from None


def strict_json(text: str | bytes, what: str) -> Any:
    """JSON in which no key stands twice and every number is finite.

    Raises:
        ModelError: naming what is wrong with `what`.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for i, n in enumerate(names) if n in names[:i])!r} stands twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant)
    except RecursionError:
        raise ModelError("model", f"{what} is nested too deep", Plain("a graph file")) from None
    except ValueError as error:
        raise ModelError("model", f"{what} is no readable JSON: {error}", Plain("a graph file")) from None
