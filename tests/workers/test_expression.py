"""The formula language: what it computes, and that nothing outside of it gets through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray_workers.errors import SpecError
from jacray_workers.models import expression
from jacray_workers.models.expression import parse

A = torch.tensor([2.0, 3.0], dtype=torch.float64)
B = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)

VALUES = {
    "2*(a[0]**2 + a[1])": lambda: 2 * (A[0] ** 2 + A[1]),
    "mean(3*(a+3))": (3 * (A + 3)).mean,
    "a @ b": lambda: A @ B,
    "matmul(b, a)": lambda: B @ A,
    "-b[:, 0] / 4": lambda: -B[:, 0] / 4,
    "b[..., -1]": lambda: B[..., -1],
    "b[None, 0:1]": lambda: B[None, 0:1],
    "sum(b, dim=0)": lambda: B.sum(dim=0),
    "sum(b, 1, keepdim=True)": lambda: B.sum(1, keepdim=True),
    "max(b)": B.max,
    "max(b, 0)": lambda: B.clamp(min=0),
    "min(b, dim=1)": lambda: B.amin(dim=1),
    "norm(b)": B.square().sum().sqrt,
    "softmax(b)": lambda: B.softmax(-1),
    "log_softmax(b, dim=0)": lambda: B.log_softmax(0),
    "where(b > 0, b, exp(b) - 1)": lambda: torch.nn.functional.elu(B),
    "stack(a, a*2)": lambda: torch.stack([A, A * 2]),
    "stack([a[0], 1])": lambda: torch.stack([A[0], torch.tensor(1.0, dtype=A.dtype)]),
    "cat(a, a[0])": lambda: torch.cat([A, A[:1]]),
    "reshape(b, 4)": lambda: B.reshape(4),
    "reshape(b, [1, -1])": lambda: B.reshape(1, -1),
    "transpose(b)": lambda: B.T,
    "flatten(b)": B.flatten,
    "outer(a, a)": lambda: torch.outer(A, A),
    "dot(a, a)": lambda: A.dot(A),
    "clamp(b, -1, 1)": lambda: B.clamp(-1, 1),
    "pow(a, 3)": lambda: A**3,
    "prod(a)": A.prod,
    "logsumexp(a)": lambda: A.logsumexp(-1),
    "sin(a)*pi": lambda: A.sin() * torch.pi,
    "sqrt(2) * a": lambda: A * 2**0.5,
    "2**10": lambda: torch.tensor(1024),
}


@pytest.mark.parametrize("text", VALUES)
def test_a_formula_has_the_value_that_torch_gives_it(text):
    value = parse(text)({"a": A, "b": B})
    torch.testing.assert_close(torch.as_tensor(value), VALUES[text](), check_dtype=False)


def test_names_come_in_the_order_of_their_first_use_without_functions_and_constants():
    assert parse("sum(c*b) + pi*a + b").names == ("c", "b", "a")


REFUSED = {
    "a.b": ("may not reach for attributes", "a.b"),
    "sum(a).item()": ("may call only functions by name", "sum(a).item()"),
    "__import__('os')": ("calls __import__, which is not a known function", "__import__"),
    "eval(a)": ("calls eval, which is not a known function", "eval(a)"),
    "sun(a)": ("calls sun, which is not a known function", "did you mean sum?"),
    "sum(a, dims=0)": ("unexpected keyword argument 'dims'", "write sum(x, dim, keepdim)"),
    "sum()": ("missing a required argument: 'x'", "sum()"),
    "sum(*a)": ("may not use * or ** in a call", "sum(*a)"),
    "'text'": ("may hold only real numbers and names", "'text'"),
    "1j * a": ("may hold only real numbers and names", "1j"),
    "1e999": ("may hold finite numbers only", "1e999"),
    "9999999999999999 * a": ("may hold whole numbers up to 1e+15 only", "9999999999999999"),
    "a ** 65": ("may raise to powers up to 64 only", "a ** 65"),
    "a ** -65": ("may raise to powers up to 64 only", "a ** -65"),
    "a // 2": ("may use only the operators + - * / ** @", "a // 2"),
    "a % 2": ("may use only the operators", "a % 2"),
    "a << 2": ("may use only the operators", "a << 2"),
    "~a": ("may use only the signs + and -", "~a"),
    "0 < a < 1": ("may compare only two things", "0 < a < 1"),
    "a is None": ("may compare only two things", "a is None"),
    "a and a": ("may not hold BoolOp", "a and a"),
    "a if a else a": ("may not hold IfExp", "a if a else a"),
    "lambda: a": ("may not hold Lambda", "lambda: a"),
    "[x for x in a]": ("may not hold ListComp", "[x for x in a]"),
    "{a: a}": ("may not hold Dict", "{a: a}"),
    "f'{a}'": ("may not hold", "f'{a}'"),
    "(x := a)": ("may not hold NamedExpr", "x := a"),
    "await a": ("may not hold Await", "await a"),
    "a +": ("must be an expression", "a +"),
    "a = 1": ("must be an expression", "a = 1"),
    "import os": ("must be an expression", "import os"),
    "": ("must be an expression", "write something like"),
    "a\x00": ("must be an expression", "a"),
    "2 a": ("must be an expression", "2 a"),
    "(" * 500 + "a" + ")" * 500: ("must be an expression", "(((("),
    "-" * 1990 + "a": ("must nest at most 60 deep", "----"),
    "a" + "+a" * 900: ("must nest at most 60 deep", "a+a+"),
    "a" * 2001: ("must have at most 2000 characters", "2001 characters"),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:24]))
def test_what_is_outside_the_grammar_is_refused_with_what_it_was(text):
    with pytest.raises(SpecError) as caught:
        parse(text, "model.expression")
    rule, shown = REFUSED[text]
    assert caught.value.argument == "model.expression"
    assert rule in caught.value.rule
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("2 ** 64 ** 64 * a", "may raise to powers up to 64 only"),
        ("((1e15 ** 60) ** 60) * a", "has no value"),
        ("1/0 + a", "has no value"),
        ("((10**15)**64) * a", "overflows"),
        ("[a] * 3", "may not do arithmetic on lists"),
        ("a[a]", "may index with whole numbers and slices only"),
        ("a[0.5]", "may index with whole numbers and slices only"),
        ("a[True]", "may index with whole numbers and slices only"),
        ("outer(flatten(outer(big, big)), big)", "may hold at most 16,777,216 numbers per sample"),
    ],
)
def test_what_only_values_show_is_refused_when_it_is_evaluated(text, rule):
    values = {"a": A, "big": torch.empty(1000, device="meta")}
    found = parse(text)
    with pytest.raises(SpecError) as caught:
        found(values)
    assert rule in caught.value.rule


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab01.+-*/()[]{},:=<>'\"_ \n\\@%&|~ifesumexp", max_size=40))
def test_any_text_is_parsed_or_refused_as_a_spec_error(text):
    try:
        found = parse(text)
    except SpecError:
        return
    assert set(found.names) <= set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def test_a_parsed_expression_only_holds_allowed_functions():
    assert {"exec", "eval", "open", "getattr"}.isdisjoint(expression.functions())
