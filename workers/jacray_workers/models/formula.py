"""The spec of a model that is written as a formula."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jacray_workers.errors import Plain, SpecError
from jacray_workers.models.expression import Expression, functions, parse
from jacray_workers.spec_parts import Spec
from jacray_workers.validation import nearest

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
Formula = str | tuple[str, ...]


class FunctionModel(Spec):
    """A function of one sample, such as `2*(a[0]**2 + a[1])`, evaluated for each sample of the batch.

    Attributes:
        expression: one expression, a list of them (stacked), or a mapping from output names to either.
        inputs: the names that stand for inputs, in order; may be left out where there is only one.
        constants: fixed numbers or nested lists by name.
        parameters: the same, as parameters of the model that can be differentiated.
    """

    kind: Literal["function"] = "function"
    expression: Formula | dict[str, Formula]
    inputs: tuple[str, ...] | None = None
    constants: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)

    @field_validator("expression", mode="before")
    @classmethod
    def _is_parsable(cls, value: Any) -> Any:
        for path, text in formulas(value):
            if not isinstance(text, str):
                raise SpecError(path, "must be an expression, a list of them or a mapping by output name", text)
            parse(text, path)
        if isinstance(value, Mapping | list | tuple) and not value:
            raise SpecError("", "must hold at least one expression", value)
        return value

    @field_validator("constants", "parameters", mode="before")
    @classmethod
    def _are_numbers(cls, value: Any) -> Any:
        from jacray_workers.nested import tensor_of

        if isinstance(value, Mapping):
            for name, numbers in value.items():
                _check_name(str(name), str(name))
                tensor_of(numbers, str(name))
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> FunctionModel:
        for place, name in enumerate(self.inputs or ()):
            _check_name(name, f"inputs.{place}")
        given = [*(self.inputs or ()), *self.constants, *self.parameters]
        twice = next((n for i, n in enumerate(given) if n in given[:i]), None)
        if twice is not None:
            raise SpecError("inputs", "must differ from constants and parameters, and from each other", twice)
        for path, expression in self.parsed():
            unknown = [n for n in expression.names if n not in given]
            if self.inputs is not None and unknown:
                where, rule = _join("expression", path), f"reads the unknown name {unknown[0]}"
                raise SpecError(where, rule, expression.text, nearest(unknown[0], given))
        self.input_names  # noqa: B018 - raises where the names cannot be inferred
        return self

    def parsed(self) -> Iterator[tuple[str, Expression]]:
        """Each expression with its dotted path below `expression`."""
        for path, text in formulas(self.expression):
            yield path, parse(text, path)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs' names in order.

        Raises:
            SpecError: they are not given and there is not exactly one.
        """
        if self.inputs is not None:
            return self.inputs
        known = {*self.constants, *self.parameters}
        free = list(dict.fromkeys(n for _, e in self.parsed() for n in e.names if n not in known))
        if len(free) != 1:
            found = Plain(f"the free names {', '.join(free)}") if free else Plain("no free name")
            raise SpecError("inputs", "is required where the expression does not read exactly one free name", found)
        return tuple(free)


def _check_name(name: str, argument: str) -> None:
    if not _NAME.match(name) or name in functions() or name == "pi":
        raise SpecError(argument, "must be a name of letters and digits that is no function", Plain(name))


def formulas(value: Any) -> Iterator[tuple[str, Any]]:
    """The texts of an expression field, each with its dotted path; the empty path for a bare text."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            for path, text in formulas(inner):
                yield _join(str(name), path), text
    elif isinstance(value, list | tuple):
        yield from ((str(i), text) for i, text in enumerate(value))
    else:
        yield "", value


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
