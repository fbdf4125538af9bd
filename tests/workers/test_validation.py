"""One complaint out of pydantic's many: the branch that the user meant, at the user's own key."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from jacray_workers.errors import RequestError
from jacray_workers.request import make_request
from jacray_workers.validation import ByKind, explain, kinds_of, nearest
from pydantic import BaseModel, ConfigDict, ValidationError


class Cat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat"] = "cat"
    lives: int
    kittens: tuple[Annotated[Cat | Dog, ByKind()], ...] = ()


class Dog(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog", "hound"] = "dog"
    name: str = ""


class Home(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pet: Annotated[Cat | Dog, ByKind()]
    by_name: dict[str, Dog] = {}


Cat.model_rebuild()
Home.model_rebuild()


def told(data):
    with pytest.raises(ValidationError) as caught:
        Home.model_validate(data)
    return explain(caught.value, Home)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"pet": {"kind": "cow"}}, ("pet.kind", "must be one of cat, dog, hound", "cow")),
        ({"pet": {"lives": 9}}, ("pet.kind", "is required: one of cat, dog, hound", None)),
        ({"pet": 3}, ("pet", "must be a mapping with a kind: one of cat, dog, hound", 3)),
        ({"pet": {"kind": "cat"}}, ("pet.lives", "is required", None)),
        ({"pet": {"kind": "cat", "lifes": 9}}, ("pet.lifes", "is not a known name", None)),
        ({"pet": {"kind": "hound", "nam": ""}}, ("pet.nam", "is not a known name", None)),
        ({"pet": {"kind": "cat", "lives": "many"}}, ("pet.lives", "must be a whole number", "many")),
        (
            {"pet": {"kind": "cat", "lives": 9, "kittens": [{"kind": "dog"}, {"kind": "dog", "x": 1}]}},
            ("pet.kittens.1.x", "is not a known name", None),
        ),
        ({"pet": {"kind": "dog"}, "by_name": {"rex": {"nme": 1}}}, ("by_name.rex.nme", "is not a known name", None)),
    ],
)
def test_kinds_are_told_apart_and_named(data, expected):
    assert told(data)[:3] == expected


def test_an_unknown_key_is_compared_with_the_chosen_kinds_own():
    assert told({"pet": {"kind": "cat", "lifes": 9}})[3] == "did you mean lives?"
    assert told({"pet": {"kind": "dog", "lives": 9}})[3] == "known names: kind, name"


def test_instances_pass_and_keep_their_class():
    assert isinstance(Home(pet=Dog(name="rex")).pet, Dog)
    assert kinds_of(Dog) == ("dog", "hound")


@pytest.mark.parametrize(
    ("fields", "argument", "rule"),
    [
        ({"wrt": {"module": "a", "sid": 1}}, "wrt.sid", "is not a known name"),
        ({"wrt": {"module": "a", "side": "outpt"}}, "wrt.side", "must be one of input or output"),
        ({"wrt": 3}, "wrt", "must be a text, a mapping or a list"),
        ({"wrt": ["inputs", 3]}, "wrt.1", "must be a text or a mapping"),
        ({"memory_budget": []}, "memory_budget", "must be a whole number, a number or a text"),
        ({"returns": ["jacobian", "jpv"]}, "returns.1", "must be one of outputs, jacobian"),
    ],
)
def test_a_union_is_told_as_one_rule_without_its_branches(fields, argument, rule):
    with pytest.raises(RequestError) as caught:
        make_request(**fields)
    assert caught.value.argument == argument
    assert caught.value.rule.startswith(rule)


def test_nearest_proposes_or_lists():
    assert nearest("metod", ["method", "wrt"]) == "did you mean method?"
    assert nearest("zzz", ["method", "wrt"]) == "known names: method, wrt"
