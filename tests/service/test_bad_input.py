"""The same mistakes through every door, a function, a client and a file: told by argument, rule and value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jacray
import numpy as np
import pytest
import torch
from jacray.cli.commands import run_file
from jacray.emit import dump
from torch import nn

LAYERS: list[dict[str, Any]] = [
    {"kind": "Linear", "in_features": 3, "out_features": 4},
    {"kind": "Tanh"},
    {"kind": "Linear", "in_features": 4, "out_features": 2},
]


@dataclass(frozen=True)
class Mistake:
    """A wrong request, and what must stand in the message.

    Attributes:
        name: for the test's name.
        fields: of the request.
        error: the class that is raised.
        says: each of these stands in the message.
        shape: of the inputs.
        dtype: of the inputs.
    """

    name: str
    fields: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]
    shape: tuple[int, ...] = (5, 3)
    dtype: str = "float32"
    model: dict[str, Any] = field(default_factory=lambda: {"kind": "layers", "layers": LAYERS})


MISTAKES = (
    Mistake(
        "weights with a wrong rank",
        {"returns": ["weighted_gradient"], "weights": [[[[1.0, 2.0]]]]},
        jacray.RequestError,
        ("weights", "(2,) the same for every sample", "(5, 2) one per sample", "(K, 5, 2)", "(1, 1, 1, 2)"),
    ),
    Mistake(
        "weights for another batch",
        {"returns": ["weighted_gradient"], "weights": [[1.0, 2.0]] * 4},
        jacray.RequestError,
        ("weights", "(5, 2) one per sample", "(4, 2)"),
    ),
    Mistake("no weights", {"returns": ["weighted_gradient"]}, jacray.RequestError, ("weights", "are required", "(2,)")),
    Mistake("no vectors", {"returns": ["jvp"]}, jacray.RequestError, ("vectors", "are required", "(3,)")),
    Mistake(
        "an unknown method", {"method": "revers"}, jacray.UserError, ("method", "'revers'", "did you mean reverse?")
    ),
    Mistake("an unknown result", {"returns": ["jacobain"]}, jacray.UserError, ("returns", "did you mean jacobian?")),
    Mistake("a glob that matches nothing", {"wrt": "0.wieght"}, jacray.RequestError, ("wrt", "0.wieght", "0.weight")),
    Mistake("an output that is not there", {"outputs": [2]}, jacray.RequestError, ("outputs", "2 numbers", "-2 to 1")),
    Mistake("a chunk of none", {"chunk_size": 0}, jacray.UserError, ("chunk_size", "must be at least 1; got 0")),
    Mistake(
        "a policy for NaN that drops", {"nan_policy": "omit"}, jacray.UserError, ("nan_policy", "propagate or raise")
    ),
    Mistake(
        "a small budget",
        {"memory_budget": 10},
        jacray.BudgetError,
        ("memory_budget", "1 sample at a time would take", "got a budget of 10 B"),
    ),
    Mistake("an empty batch", {}, jacray.UserError, ("inputs", "(0, 3)"), (0, 3)),
    Mistake("integers", {}, jacray.InputError, ("inputs", "must be floating point", "int64"), (5, 3), "int64"),
    Mistake("another width", {}, jacray.ModelError, ("model", "(1, 7) float32", "RuntimeError"), (5, 7)),
    Mistake("log|det| of no square", {"returns": ["logabsdet"]}, jacray.RequestError, ("2 rows by 3 columns",)),
    Mistake(
        "coupled samples",
        {"training": True},
        jacray.CoupledSamplesError,
        ("module 1", "training"),
        model={"kind": "layers", "layers": [LAYERS[0], {"kind": "BatchNorm1d", "num_features": 4}]},
    ),
)
ids = [mistake.name for mistake in MISTAKES]


def inputs(mistake: Mistake) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(mistake.shape).mul(3).to(getattr(torch, mistake.dtype))


def check(mistake: Mistake, text: str) -> None:
    for part in mistake.says:
        assert part in text, text


@pytest.mark.parametrize("mistake", MISTAKES, ids=ids)
def test_functions(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as raised:
        jacray.compute(mistake.model, inputs(mistake), **mistake.fields)
    assert isinstance(raised.value, jacray.UserError)
    assert isinstance(raised.value, ValueError)
    check(mistake, str(raised.value))


@pytest.mark.parametrize("mistake", MISTAKES, ids=ids)
def test_clients(mistake: Mistake, client: jacray.Client) -> None:
    with pytest.raises(mistake.error) as raised:
        client.submit(mistake.model, inputs(mistake), **mistake.fields)
    check(mistake, str(raised.value))


@pytest.mark.parametrize("mistake", MISTAKES, ids=ids)
def test_files(mistake: Mistake, tmp_path: Path) -> None:
    spec = {
        "model": mistake.model,
        "inputs": {"kind": "npy", "path": "x.npy"},
        "request": mistake.fields,
        "cluster": {"address": "inline"},
        "output": {"path": str(tmp_path / "run")},
    }
    np.save(tmp_path / "x.npy", inputs(mistake).numpy())
    file = tmp_path / "spec.yaml"
    file.write_text(dump(spec), encoding="utf-8")
    with pytest.raises(jacray.UserError) as raised:
        run_file(str(file), [])
    text = str(raised.value)
    assert "spec.yaml" in text
    check(mistake, text)
    assert not (tmp_path / "run").exists()


def raises(x: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such head")


def test_a_model_that_raises_keeps_its_cause() -> None:
    with pytest.raises(jacray.ModelError, match="KeyError: 'no such head'") as raised:
        jacray.jacobian(raises, torch.ones(2, 3))
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_nan_is_located_or_refused() -> None:
    net = nn.Linear(3, 2)
    x = torch.ones(4, 3)

    def root(a: torch.Tensor) -> torch.Tensor:
        return net(a).sum(dim=1, keepdim=True) * 0 + (a - 1).sqrt()

    found = jacray.compute(root, x)
    assert not torch.isfinite(found.jacobian).all()
    assert found.receipt["nonfinite"]
    with pytest.raises(jacray.NonFiniteError, match="first at sample 0"):
        jacray.compute(root, x, nan_policy="raise")
