"""A job is the same job when all its digests are equal: here and in another process."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jacray.digests import digest, digests
from jacray_workers.request import make_request

from tests.toys import mlp, scaled

ROOT = Path(__file__).parents[2]


def test_the_same_in_another_process() -> None:
    imports = "from jacray.digests import digest; from tests.toys import mlp, scaled; "
    code = f"{imports}print(digest(scaled()), digest(mlp()), digest(digest))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.stdout.split() == [digest(scaled()), digest(mlp()), digest(digest)]


def test_what_decides_the_numbers_decides_the_digest() -> None:
    first = digest(scaled())
    changed = scaled()
    with torch.no_grad():
        changed.linear.bias[1] += 1e-7
    frozen = scaled()
    frozen.linear.weight.requires_grad_(False)
    assert len({first, digest(scaled(3.0)), digest(changed), digest(scaled().eval()), digest(frozen)}) == 5
    assert digest(scaled()) == first


def test_functions_are_told_by_their_source_and_what_they_brought_along() -> None:
    def made(scale: torch.Tensor):
        return lambda x: x * scale

    def other(scale: torch.Tensor):
        return lambda x: x + scale

    one, two = torch.ones(3), torch.ones(3) * 2
    assert digest(made(one)) == digest(made(one.clone()))
    assert len({digest(made(one)), digest(made(two)), digest(other(one))}) == 3
    assert digest(functools.partial(made, one)) != digest(functools.partial(made, two))


def test_a_function_that_calls_itself_has_a_digest() -> None:
    def down(x: torch.Tensor, n: int = 3) -> torch.Tensor:
        return x if n == 0 else down(x * 2, n - 1)

    assert digest(down) == digest(down)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 1}, {"x": 1.0}),
        ([1, [2]], [[1], 2]),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ("ab", b"ab"),
        (True, 1),
        (None, ""),
    ],
)
def test_values_that_differ_have_digests_that_differ(a: object, b: object) -> None:
    assert digest(a) != digest(b)


def test_a_view_is_what_it_shows() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert digest(x.T) == digest(x.T.contiguous()) != digest(x.reshape(4, 3))


def test_each_part_of_a_job_has_its_own() -> None:
    x = torch.randn(4, 5)
    base = digests(mlp(), x, make_request(None, weights=torch.ones(3)), 1)
    for name, other in {
        "model": digests(mlp(seed=1), x, make_request(None, weights=torch.ones(3)), 1),
        "inputs": digests(mlp(), x + 1, make_request(None, weights=torch.ones(3)), 1),
        "request": digests(mlp(), x, make_request(None, weights=torch.zeros(3)), 1),
        "threads": digests(mlp(), x, make_request(None, weights=torch.ones(3)), 2),
    }.items():
        assert [key for key in base if base[key] != other[key]] == [name]
